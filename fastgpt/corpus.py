"""Text as tokens: files are read as UTF-8 and encoded piece by piece.

A text is `ids` (n + 1,) int64: an end-of-text token, which stands before every text, and the text's n tokens.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .progress import Progress

PIECE_CHARACTERS = 2**16
_LINE_FEED_AFTER_TEXT = re.compile(r"(?<=\S)\n")


def read_text(file: Path) -> str:
    """The file's text with unchanged line ends.

    Raises ValueError when there is no such file, it is not UTF-8, or it holds nothing but white space.
    """
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        raise ValueError(f"no file {file}: give a text file in UTF-8") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text in UTF-8: {error}") from None
    if not text.strip():
        raise ValueError(f"{file} is empty: give a file with text in it")
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress | None = None) -> Tensor:
    """An end-of-text token, if the tokenizer has one, and the text's n tokens: (n + 1,) int64.

    The pieces of a long text give the tokens of the whole, because GPT-2's tokenizer also cuts where they are cut.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    n_done = 0
    for piece in pieces(text, PIECE_CHARACTERS):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        n_done += len(piece)
        if progress is not None:
            progress("tokenising", n_done, len(text))
    return torch.tensor(ids)


def pieces(text: str, n_characters: int) -> Iterator[str]:
    """The text in pieces of at least `n_characters` that end before a line feed; a long line stays whole."""
    start = 0
    while start < len(text):
        cut = _LINE_FEED_AFTER_TEXT.search(text, start + n_characters)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
