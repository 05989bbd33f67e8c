"""Find the file and the key of a checkpoint that make transformers fail, whatever it raised."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..messages import one_line, shown
from .headers import CheckpointError, read_json

# Small sizes, because the sizes were checked before and a small model is built faster.
_TINY = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_inner": 8, "n_positions": 8, "vocab_size": 8}


def faulty_key(fields: dict[str, Any], use: Callable[[dict[str, Any]], Any]) -> str | None:
    """The key whose removal, after that of all keys before it, makes `use(fields)` work.

    None when it works unchanged or never. If several keys are faulty, the result is the last one.
    """

    def works() -> bool:
        with suppress(Exception):
            use(dict(rest))
            return True
        return False

    rest = dict(fields)
    if works():
        return None
    for key in fields:
        del rest[key]
        if works():
            return key
    return None


def find_fault(load: Callable[[dict[str, Any]], Any], directory: Path, error: Exception) -> CheckpointError | None:
    """The fault in the files of a directory that could not be loaded; None when the files are not to blame.

    load: builds a model from the fields of a config.json alone. error: what loading raised.
    """
    uses = {
        "config.json": lambda fields: load(fields | _TINY),
        "generation_config.json": GenerationConfig.from_dict,
    }
    for name, use in uses.items():
        file = directory / name
        if file.is_file():
            fields = read_json(file)
            if key := faulty_key(fields, use):
                return CheckpointError(f"{file}: cannot be used: {key} {shown(fields[key])}: {one_line(error)}")
    return None
