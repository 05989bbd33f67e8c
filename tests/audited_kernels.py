"""Audits kernels of which each has one fault, and prints the findings as JSON; run without TRITON_INTERPRET."""

import json
from dataclasses import asdict, replace

import triton
import triton.language as tl
from fastgpt_kernels import audit
from fastgpt_kernels.fused.launch import Configuration


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


def square(label: str, dtype: str, block: int, precision: str, tensor_cores: bool = False) -> Configuration:
    constants = {"BLOCK": block, "PRECISION": precision}
    return Configuration("square", _square_kernel, label, dtype, constants, tensor_cores=tensor_cores)


if __name__ == "__main__":
    plain = Configuration("scale", _scaling_kernel, "sound", "fp32", {"BLOCK": 1024})
    cases = [
        (plain, "sm_90"),
        (plain, "gfx942"),
        (replace(plain, label="spills", constants={"BLOCK": 16384}, num_warps=1), "sm_90"),
        (replace(plain, label="does not compile", constants={"BLOCK": 1000}), "sm_90"),
        (square("tf32", "fp32", 32, "tf32"), "sm_90"),
        (square("no tf32", "fp32", 32, "ieee"), "sm_90"),
        (square("wgmma", "bf16", 64, "ieee", tensor_cores=True), "sm_90"),
        (replace(plain, label="no wgmma", tensor_cores=True), "sm_90"),
    ]
    print(json.dumps([asdict(audit.audit(*case)) for case in cases]))
