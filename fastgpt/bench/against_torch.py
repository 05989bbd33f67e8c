"""Times each operation on its kernel and in torch on a GPU, for the table that `auto` follows (`measured.py`)."""

from collections.abc import Iterator
from typing import Any

import torch
from fastgpt_kernels import OPERATIONS
from fastgpt_kernels.common.precision import float32_products

import fastgpt.bench.operations as operations

from .. import measured, ops
from ..accounting import shape_of
from ..progress import Progress
from .parity import ParityError

N_BATCH = 4
# Timed seconds of each operation, pass and backend.
_ROW_S = 0.2
# By precision: the dtype, and whether float32 may be rounded to tf32.
PRECISIONS = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}


def measure_against_torch(model: str, device: torch.device, progress: Progress) -> dict[str, Any]:
    """A table as `measured` reads it, at the shape of a model, with N_BATCH sequences as long as its context.

    model: as for `shape_of`. device: a GPU. Every operation is checked before it is timed.
    Raises KernelUnavailableError where no kernel runs, ParityError where one is wrong, ValueError on an unknown model.
    """
    shape, rows = shape_of(model), []
    n_steps = len(PRECISIONS) * len(OPERATIONS)
    for precision, (dtype, tf32) in PRECISIONS.items():
        with float32_products(tf32=tf32), ops.backend("triton"):
            for case in operations.cases(shape, N_BATCH, shape.n_positions, device, dtype):
                # Attention with dropout is left out, because `auto` always takes its kernel.
                if case.operation in OPERATIONS:
                    n_done = len({(row["operation"], row["precision"]) for row in rows})
                    progress(f"{case.operation} in {precision}", n_done, n_steps)
                    rows += _rows(case, precision)
    size = {"model": model, "batch": N_BATCH, "tokens": shape.n_positions}
    return {**measured.machine(device), **size, "rows": rows}


def _rows(case: operations.Case, precision: str) -> Iterator[dict[str, Any]]:
    if fault := operations.check(case):
        raise ParityError(f"{fault} in {precision}: nothing was timed")
    device = case.inputs[0].device
    for passed in ("forward", "forward+backward"):
        torch_s, kernel_s = (
            operations.time_call(operations.make_call(case.contenders[name], case.inputs, passed), device, _ROW_S)
            for name in ("torch", "fastgpt")
        )
        yield {
            "operation": case.operation,
            "precision": precision,
            "pass": passed,
            "torch_s": torch_s["median_s"],
            "kernel_s": kernel_s["median_s"],
        }
