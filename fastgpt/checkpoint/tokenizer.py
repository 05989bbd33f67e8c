"""Load a tokenizer; an error is one line that names the file."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ..messages import one_line
from .headers import MAX_TOKENIZER_BYTES, CheckpointError, CheckpointFileError, read_json, read_limited
from .loading import load_without_code

_OBJECTS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a directory or model id. Raises CheckpointError when none can be used."""
    directory = Path(name)
    if directory.is_dir():
        _check_files(directory)
    try:
        tokenizer = load_without_code(AutoTokenizer, name)
    except CheckpointError:
        raise
    except Exception as error:  # fields of a wrong type reach code that does not check them
        kind = CheckpointFileError if isinstance(error, OSError) else CheckpointError
        raise kind(f"{_culprit(directory)}: no tokenizer can be made of it: {one_line(error)}") from error
    # Where config.json names a GPT-2 and no file holds a vocabulary, transformers makes a tokenizer without one.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CheckpointFileError(
            f"{name}: holds no tokenizer: save one there, as by tokenizer.save_pretrained({name!r})"
        )
    return tokenizer


def _check_files(directory: Path) -> None:
    for file in (directory / name for name in _OBJECTS):
        if file.is_file():
            read_json(file, MAX_TOKENIZER_BYTES)
    merges = directory / "merges.txt"
    if merges.is_file():
        try:
            read_limited(merges, MAX_TOKENIZER_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{merges}: not UTF-8: {error.reason} at byte {error.start}") from error


def _culprit(directory: Path) -> Path:
    """The file to blame: tokenizer.json if it cannot be loaded alone, else tokenizer_config.json."""
    whole, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if whole.is_file():
        try:
            Tokenizer.from_file(str(whole))
        except Exception:  # tokenizers raises plain Exception
            return whole
    return settings if settings.is_file() else directory
