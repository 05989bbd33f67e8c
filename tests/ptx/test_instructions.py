"""Instructions against NumPy: those that came with sm_100 and sm_120, and bytes put in another order."""

import numpy as np
import pytest
import torch

from . import machine, numeric, parse, translate
from .memory import GlobalMemory, Report

# Each of 32 threads loads four float32 and stores what CODE leaves in %f5 and %f6.
TEXT = """
.version 8.7
.target sm_120
.address_size 64
.visible .entry one(.param .u64 x, .param .u64 y) .reqntid 32 {
.reg .b32 %r<3>; .reg .b64 %rd<9>; .reg .f32 %f<9>;
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [y];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 16;
add.s64 %rd4, %rd1, %rd3;
ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd4];
mov.b64 %rd5, {%f1, %f2};
mov.b64 %rd6, {%f3, %f4};
CODE
mul.wide.u32 %rd7, %r1, 8;
add.s64 %rd7, %rd2, %rd7;
st.global.v2.f32 [%rd7], {%f5, %f6};
ret;
}
"""


def results(code: str) -> tuple[np.ndarray, np.ndarray]:
    """x (32, 4) and what is stored (32, 2)."""
    x, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(32, 2)
    program, report = translate.translate(parse.parse(TEXT.replace("CODE", code))), Report()
    spans = [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in (("x", x), ("y", y))]
    parameters = {name: np.array([start], "u8").tobytes() for name, start, _ in spans}
    machine.run_grid(program, (1, 1, 1), parameters, 0, GlobalMemory(spans, spans, report), report, machine.Options())
    assert report.kinds() == set()
    return x.numpy(), y.numpy()


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.rn.f32x2", "%rd5, %rd6", lambda a, b: a + b),
        ("sub.rn.f32x2", "%rd5, %rd6", lambda a, b: a - b),
        ("mul.rn.f32x2", "%rd5, %rd6", lambda a, b: a * b),
        ("fma.rn.f32x2", "%rd5, %rd6, %rd5", lambda a, b: (a.astype(np.float64) * b + a).astype(np.float32)),
    ],
)
def test_pairs_of_float32(opcode: str, operands: str, expected) -> None:
    x, y = results(f"{opcode} %rd8, {operands}; mov.b64 {{%f5, %f6}}, %rd8;")
    np.testing.assert_array_equal(y, expected(x[:, :2], x[:, 2:]))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize(
    ("comparison", "expected"), [("le", np.less_equal), ("gt", np.greater), ("neu", np.not_equal), ("eq", np.equal)]
)
def test_pairs_of_halves_are_compared(kind: str, comparison: str, expected) -> None:
    """One predicate for the low halves of two words and one for the high halves."""
    x, y = results(
        f".reg .pred %p<3>; .reg .b32 %q<3>; cvt.rn.{kind}.f32 %q1, %f2, %f1; cvt.rn.{kind}.f32 %q2, %f4, %f3; "
        f"setp.{comparison}.{kind} %p1|%p2, %q1, %q2; "
        "selp.f32 %f5, 0f3F800000, 0f00000000, %p1; selp.f32 %f6, 0f3F800000, 0f00000000, %p2;"
    )
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    rounded = torch.from_numpy(x).to(dtype).double().numpy()
    np.testing.assert_array_equal(y, expected(rounded[:, :2], rounded[:, 2:]))


def test_halves_of_words_are_added_without_a_carry() -> None:
    x, y = results(
        ".reg .b32 %q<4>; mov.b32 %q1, %f1; mov.b32 %q2, %f2; add.s16x2 %q3, %q1, %q2; mov.b32 %f5, %q3; "
        "mov.b32 %f6, %q1;"
    )
    halves = x.view(np.uint16)
    np.testing.assert_array_equal(y.view(np.uint16)[:, :2], halves[:, :2] + halves[:, 2:4])
    assert (halves[:, 0].astype(int) + halves[:, 2] > 0xFFFF).any()


def test_extremes_of_three() -> None:
    x, y = results("max.f32 %f5, %f1, %f2, %f3; min.f32 %f6, %f1, %f2, %f3;")
    np.testing.assert_array_equal(y, np.stack([x[:, :3].max(1), x[:, :3].min(1)], 1))


@pytest.mark.parametrize("selector", [0x5410, 0x7632, 0x0123, 0x7777, 0x1054])
def test_bytes_in_an_order_known_beforehand(selector: int) -> None:
    """As in an order that each lane gives for itself."""
    a, b = np.random.default_rng(0).integers(0, 1 << 32, (2, 64), dtype=np.uint64).astype(np.uint32)
    by_lane = numeric.permute_bytes(a, b, np.full(64, selector, np.uint32))
    np.testing.assert_array_equal(numeric.permute_bytes(a, b, np.uint32(selector)), by_lane)
