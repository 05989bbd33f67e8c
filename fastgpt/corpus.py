"""Text as tokens: files are read as UTF-8, encoded piece by piece, and packed into sequences of equal length.

A text is `ids` (n + 1,) int64: an end-of-text token, which stands before every text, and the text's n tokens.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .progress import Progress

PIECE_CHARACTERS = 2**16
_LINE_FEED_AFTER_TEXT = re.compile(r"(?<=\S)\n")


def text_files(path: Path) -> list[Path]:
    """The file itself, or the *.txt files of a directory in the order of their names. Raises ValueError without any."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no *.txt file in {path}: give a text file in UTF-8 or a directory of them")
    return files


def read_text(file: Path) -> str:
    """The file's text with unchanged line ends, without a byte order mark.

    Raises ValueError when there is no such file, it is not UTF-8, or it holds nothing but white space.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"no file {file}: give a text file in UTF-8") from None
    except IsADirectoryError:
        raise ValueError(f"{file} is a directory: give a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 from its byte {error.start} on: convert it (iconv -f ENCODING -t UTF-8)"
        ) from None
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
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def pieces(text: str, n_characters: int) -> Iterator[str]:
    """The text in pieces of at least `n_characters` that end before a line feed; a long line stays whole."""
    start = 0
    while start < len(text):
        cut = _LINE_FEED_AFTER_TEXT.search(text, start + n_characters)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


class Corpus(NamedTuple):
    """training: (N, T) sequences. validation: (n,) tokens that only measure."""

    training: Tensor
    validation: Tensor

    def digest(self) -> str:
        """Tells a corpus from another one."""
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in self)).hexdigest()[:16]


def pack(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    held_out: float,
    validation: str | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenise texts and cut them, an end-of-text token before each, into sequences of `context` tokens.

    validation: a text to measure on. Without it the last sequences do, a share of `held_out` and at least one.
    Raises ValueError when the texts are too short for one sequence, or held_out is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1, not {held_out}")
    ids = torch.cat([encode(tokenizer, text, progress) for text in texts])
    n_sequences = len(ids) // context
    n_held_out = 0 if validation is not None else max(1, round(held_out * n_sequences))
    n_training = n_sequences - n_held_out
    if n_training < 1:
        needed = (1 + n_held_out) * context
        raise ValueError(
            f"the text is too short: {len(ids)} tokens, and {needed} are the least: "
            "give a longer text or a shorter context"
        )
    measured = ids[n_training * context :] if validation is None else encode(tokenizer, validation, progress)
    if len(measured) < 2:
        raise ValueError(f"the validation text is too short: {len(measured)} tokens")
    return Corpus(ids[: n_training * context].view(n_training, context), measured)


def examples(rows: Any) -> list[dict[str, Tensor]]:
    """Rows of tokens in the form that Trainer takes; every token is a label."""
    return [{"input_ids": row, "labels": row} for row in rows]
