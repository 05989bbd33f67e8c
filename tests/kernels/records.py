"""What the tests that hold for every operation know of each: `record.py` in the folder of its tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import fastgpt_kernels
import pytest
import torch
from accuracy import Function, random
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
# One way to call an operation: for n rows or tokens, the shapes of its floating inputs by name and its other arguments.
Form = Callable[[int], tuple[Shapes, dict[str, Any]]]


@dataclass(frozen=True)
class Record:
    """
    forms: one for each set of options with which an operation runs or saves something else. empty: shapes without
    elements, in addition to those of no rows. several_programs: patches the launch configuration, so that a few dozen
    rows take several programs, and each of them several tiles. huge: launches its kernels with sizes past int32, on
    tensors that only claim to be there.
    """

    forms: dict[str, Form]
    empty: list[Shapes]
    several_programs: Callable[[pytest.MonkeyPatch], None]
    huge: dict[str, Callable[[], None]]


def _record(operation: str) -> Record:
    return import_module(f"{fastgpt_kernels.KERNEL_MODULES[operation]}.record").RECORDS[operation]


# Every public operation: one without a record fails here.
RECORDS: dict[str, Record] = {operation: _record(operation) for operation in fastgpt_kernels.OPERATIONS}
FORMS = [(operation, form) for operation, record in RECORDS.items() for form in record.forms]


def bind(operations: Any, operation: str, names: Sequence[str], options: dict[str, Any]) -> Function:
    """An operation with its options, as a function of its floating inputs in order."""

    def bound(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return getattr(operations, operation)(**dict(zip(names, inputs, strict=True)), **options)

    return bound


def make(shapes: Shapes, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    return [(scale * random(*shape, seed=seed)).to(dtype) for seed, shape in enumerate(shapes.values())]


def call(
    operations: Any, operation: str, form: str, n: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Function, list[Tensor]]:
    """A form as a function of its floating inputs, and such inputs for n rows or tokens."""
    shapes, options = RECORDS[operation].forms[form](n)
    return bind(operations, operation, list(shapes), options), make(shapes, dtype, scale)
