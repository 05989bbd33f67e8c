"""Audits kernels of which each has one fault, and prints the findings as JSON; run without TRITON_INTERPRET."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from fastgpt_kernels import audit
from fastgpt_kernels.audit.shipped import Call


@triton.jit
def _square_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(x, x, input_precision=PRECISION).to(out_ptr.dtype.element_ty))


@triton.jit
def _scaling_kernel(x_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    total = tl.sum(x, axis=0)
    tl.store(x_ptr + cols, x * total + tl.sum(x * total, axis=0))


def launching(kernel: Any, *pointers: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: kernel[(1,)](*pointers, **options)


def square(label: str, dtype: torch.dtype, block: int, precision: str) -> Call:
    x, out = torch.zeros(block, block, dtype=dtype), torch.zeros(block, block)
    return Call("square", label, launching(_square_kernel, x, out, BLOCK=block, PRECISION=precision))


def scale(label: str, block: int, num_warps: int = 4) -> Call:
    x = torch.zeros(block)
    return Call("scale", label, launching(_scaling_kernel, x, BLOCK=block, num_warps=num_warps))


if __name__ == "__main__":
    half, single = torch.bfloat16, torch.float32
    # By name, as products of prefill and training are.
    audit._MATRIX_KERNELS |= {"_square_kernel", "_scaling_kernel"}
    cases = [
        (scale("sound", 1024), "sm_90"),
        (scale("sound", 1024), "gfx942"),
        (scale("spills", 16384, num_warps=1), "sm_90"),
        (scale("does not compile", 1000), "sm_90"),
        (square("tf32", single, 32, "tf32"), "sm_90"),
        (square("no tf32", single, 32, "ieee"), "sm_90"),
        (square("bf16 wgmma", half, 64, "ieee"), "sm_90"),
        (square("bf16 no wgmma", half, 16, "ieee"), "sm_90"),
    ]
    launches = [(launch, chip) for call, chip in cases for launch in audit.record([call], chip)]
    print(json.dumps([asdict(audit.audit(*launch)) for launch in launches]))
