"""A model that decodes within milliseconds even in the interpreter, and a prompt for it."""

from typing import Any

import pytest
from fastgpt_kernels.operations.persistent_decode import tiles
from interpreter import DEVICE, INTERPRETING
from models import pair, tiny_config, token_ids
from torch import Tensor


def small_pair(**changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) on the device of the kernels."""
    theirs, ours = pair(tiny_config(**{"n_embd": 64, "n_head": 2, "n_layer": 1, "n_positions": 64} | changes))
    return theirs.to(DEVICE), ours.to(DEVICE)


def prompt(n_rows: int = 1) -> Tensor:
    """(B, 5) ids on the device of the kernels."""
    return token_ids(n_rows, 5, 131).to(DEVICE)


def let_persistent_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, where programs run one after the other, as one program, which need not wait for others."""
    if INTERPRETING:
        monkeypatch.setattr(tiles, "persistent_programs", lambda _: 1)
