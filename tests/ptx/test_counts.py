"""What is counted of a launch whose figures can be worked out by hand, and the formulas beside it."""

import re

import numpy as np
import pytest
import torch
from paths import ROOT

from . import counts, machine, parse, translate
from .due import FORMULAS, due
from .launch import COUNTING, Launch
from .memory import GlobalMemory, Report

# Each of 64 threads copies one float32 from x[i * STEP] to y[i] by way of shared memory.
COPY = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry copy(.param .u64 x, .param .u64 y) .reqntid 64 {
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<3>;
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [y];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, STEP;
add.s64 %rd4, %rd1, %rd3;
ld.global.f32 %f1, [%rd4];
ex2.approx.f32 %f2, %f1;
shl.b32 %r2, %r1, SHIFT;
mov.u32 %r3, global_smem;
add.u32 %r4, %r3, %r2;
st.shared.f32 [%r4], %f2;
bar.sync 0;
ld.shared.f32 %f1, [%r4];
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd6, %rd2, %rd5;
st.global.f32 [%rd6], %f1;
ret;
}
"""


def run(step: int, shift: int) -> Launch:
    text = COPY.replace("STEP", str(step)).replace("SHIFT", str(shift))
    x, y, report = torch.zeros(1024), torch.zeros(64), Report()
    spans = [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in (("x", x), ("y", y))]
    parameters = {name: np.array([start], "u8").tobytes() for name, start, _ in spans}
    memory = GlobalMemory(spans, spans, report)
    program = translate.translate(parse.parse(text))
    machine.run_grid(program, (1, 1, 1), parameters, 64 << shift, memory, report, machine.Options(**COUNTING))
    assert y.tolist() == [1.0] * 64
    return Launch("copy", (1, 1, 1), 0.0, report, {}, n_warps=2, shared=64 << shift, element_size=4)


def test_instructions_bytes_and_barriers() -> None:
    found = counts.counted(run(step=4, shift=2))
    by_kind = {kind: found[f"{kind} instructions"] for kind in counts.KINDS if found[f"{kind} instructions"]}
    # Of two warps. Loads of parameters are moves; mul, add and shl are integers.
    assert by_kind == {"special": 2, "memory": 8, "order": 2, "control": 2, "move": 8, "integer": 12}
    assert (found["load bytes"], found["load sectors"], found["store sectors"]) == (256, 8, 8)
    assert found["shared passes"] == found["fewest shared passes"] == 4
    assert (found["programs"], found["barriers"], found["waits"]) == (1, 1, 0)


def test_strided_accesses_take_more_sectors_and_passes() -> None:
    found = counts.counted(run(step=64, shift=4))
    # Every lane loads from a sector of its own, and every eighth from the same bank.
    assert (found["load bytes"], found["load sectors"]) == (256, 64)
    assert (found["shared passes"], found["fewest shared passes"]) == (16, 4)


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("add.s32", "integer"), ("setp.lt.s32", "integer"), ("fma.rn.f32", "float"), ("mul.bf16x2", "float"),
        ("fma.rn.f64", "float64"), ("cvt.rn.bf16x2.f32", "conversion"), ("rsqrt.approx.ftz.f32", "special"),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "matrix"), ("wgmma.wait_group.sync.aligned", "order"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "matrix"), ("cp.async.cg.shared.global", "memory"),
        ("cp.async.wait_group", "order"), ("ld.global.v4.b32", "memory"), ("ld.param.u64", "move"),
        ("shfl.sync.bfly.b32", "exchange"), ("bra.uni", "control"),
    ],
)  # fmt: skip
def test_kinds(opcode: str, kind: str) -> None:
    assert counts.kind_of(opcode) == kind


def test_every_kernel_has_a_formula() -> None:
    files = (ROOT / "kernels/fastgpt_kernels/operations").glob("*/*kernels.py")
    kernels = {name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)}
    assert kernels == FORMULAS.keys()


def test_formulas_give_the_figures_of_the_lessons() -> None:
    """For 16 x 1024 tokens of GPT-2 small in bfloat16."""
    heads = {"n_batch_heads": 16 * 12, "n_queries": 1024, "n_keys": 1024, "HEAD_DIM": 64}
    assert due("_causal_attention_fwd_kernel", heads, 1, 2) == (2 * 1024 * 1025 * 64 * 192, 102_236_160)
    assert due("_causal_attention_bwd_dkdv_kernel", heads, 1, 2).flops == 4 * 1024 * 1025 * 64 * 192
    rows = {"n_rows": 16384, "n_cols": 768, "HAS_RESIDUAL": True}
    assert due("_layer_norm_fwd_kernel", rows, 1, 2) == (10 * 16384 * 768, 8 * 16384 * 768)
    hidden = {"n_rows": 16384, "n_cols": 3072, "n_inner": 768, "STORE_PRE": True}
    assert due("_gelu_mlp_fwd_hidden_kernel", hidden, 1, 2) == (8 * 16384 * 768**2, 18 * 16384 * 768 + 8 * 768**2)
