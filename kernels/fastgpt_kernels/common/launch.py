"""What every fused operation needs around its kernels."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Said at every launch, because triton 3.10 changes the default: a * b + c rounds once.
FP_FUSION = {"enable_fp_fusion": True}


def cdiv(n: int, size: int) -> int:
    """How many tiles of a size cover n."""
    return -(-n // size)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of a dtype are summed: float64 for itself, else float32."""
    return torch.promote_types(dtype, torch.float32)


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """`accumulator` in triton's types."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device(x: Tensor) -> AbstractContextManager:
    """Launch on the GPU that holds x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def launch(kernel: Any, n_programs: int, x: Tensor, *pointers: Tensor | None, **arguments: Any) -> None:
    """Run n_programs programs of a kernel, whose first argument is x, on x's GPU."""
    with on_device(x):
        kernel[(n_programs,)](x, *pointers, **arguments, **FP_FUSION)


def eager_or_registered(forward: Callable, function: type[torch.autograd.Function], registered: Any) -> Callable:
    """The form in which an operation is called: three ways to the same launchers.

    registered: for torch.compile; dispatch through torch.library costs more than a launch. function: where a gradient
    may be asked for. forward: its first pass alone, for even an autograd.Function takes the host as long as a launch.
    """
    if torch.compiler.is_compiling():
        return registered
    return function.apply if torch.is_grad_enabled() else forward


def as_rows(x: Tensor) -> Tensor:
    """x (..., C), not empty, as (N, C) rows with a dense last axis: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
