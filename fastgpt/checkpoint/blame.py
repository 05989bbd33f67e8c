"""Which file and key of a checkpoint are to blame when transformers fails on it, whatever it raised."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from .headers import CheckpointError, one_line, read_json, shown

# Sizes are never to blame: they were looked at before.
_TINY = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_inner": 8, "n_positions": 8, "vocab_size": 8}


def faulty_key(fields: dict[str, Any], use: Callable[[dict[str, Any]], Any]) -> str | None:
    """The key without which, and without those before it, `use(fields)` works; None when it works as it is, or never.

    Of several faults it is the last.
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
    """What is wrong with the files of a directory that could not be loaded; None when they are not to blame.

    load: makes a model, from nothing else, of the fields of a config.json. error: what loading raised.
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
