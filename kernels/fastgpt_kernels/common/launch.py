"""Helpers for launching kernels."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Passed to every launch, because triton 3.10 changes the default: a * b + c rounds once.
FP_FUSION = {"enable_fp_fusion": True}


def cdiv(n: int, size: int) -> int:
    """How many tiles of a given size cover n."""
    return -(-n // size)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of a dtype are summed: float64 for itself, else float32."""
    return torch.promote_types(dtype, torch.float32)


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """`accumulator` in triton's types."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device(x: Tensor) -> AbstractContextManager:
    """A context in which the GPU that holds x is the current one; nearly free where it is already."""
    is_current = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(x.device)


def launch(kernel: Any, n_programs: int, x: Tensor, *pointers: Tensor | None, **arguments: Any) -> None:
    """Run n_programs programs of a kernel on the GPU of x, its first argument."""
    with on_device(x):
        kernel[(n_programs,)](x, *pointers, **arguments, **FP_FUSION)


def eager_or_registered(forward: Callable, function: type[torch.autograd.Function], registered: Any) -> Callable:
    """The cheapest way to call an operation now; all three reach the same launchers.

    registered: for torch.compile, because dispatch through torch.library costs more host time than a launch. function:
    where gradients are enabled. forward: without them, because even an autograd.Function costs as much as a launch.
    """
    if torch.compiler.is_compiling():
        return registered
    return function.apply if torch.is_grad_enabled() else forward


def as_rows(x: Tensor) -> Tensor:
    """x (..., C), not empty, as (N, C) rows with a dense last axis: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
