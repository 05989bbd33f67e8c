"""Instructions of machine code that a launch executes, of kernels whose figures can be worked out by hand."""

from collections import Counter

import pytest

from . import machine_code

TIMES = 1000
# Each lane takes exponentials in a loop. An inverse root in it is the same every time, and a sum in it is not used.
LOOP = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry loop(.param .u64 x, .param .u32 n) .reqntid 64 {
.reg .pred %p<2>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>;
ld.param.u64 %rd1, [x];
ld.param.u32 %r1, [n];
mov.u32 %r2, %tid.x;
mul.wide.u32 %rd2, %r2, 4;
add.s64 %rd3, %rd1, %rd2;
ld.global.f32 %f1, [%rd3];
mov.f32 %f4, %f1;
mov.u32 %r3, 0;
$again:
rsqrt.approx.ftz.f32 %f2, %f4;
ex2.approx.ftz.f32 %f3, %f1;
add.f32 %f1, %f2, %f3;
add.s32 %r4, %r2, %r3;
add.s32 %r3, %r3, 1;
setp.lt.u32 %p1, %r3, %r1;
@%p1 bra $again;
st.global.f32 [%rd3], %f1;
ret;
}
"""


def executed(text: str) -> tuple[int, Counter]:
    """The registers and the executed instructions of two warps. The second block of PTX is the loop."""
    return machine_code.executed(text, {0: 2, 1: 2 * TIMES, 2: 2}, "sm_90")


def test_a_loop_counts_as_often_as_it_runs_and_what_left_it_once() -> None:
    registers, found = executed(LOOP)
    assert 0 < registers < 32
    # Whether or not ptxas unrolled the loop: an exponential each time, and one root of each warp.
    assert found["special machine instructions"] == pytest.approx(2 * (TIMES + 1), rel=0.01)
    assert found["FMA machine instructions"] == pytest.approx(2 * TIMES, rel=0.01)
    # A counter, a comparison and a branch are left, or less where the loop is unrolled; the unused sum is not.
    assert 4 * TIMES < found["machine instructions"] < 2 * 6 * TIMES


def test_the_product_of_integers_has_a_unit_of_its_own() -> None:
    _, before = executed(LOOP)
    product = "mul.lo.s32 %r5, %r4, %r3;\nxor.b32 %r6, %r6, %r5;\n"
    text = LOOP.replace("add.s32 %r3, %r3, 1;\n", product + "add.s32 %r3, %r3, 1;\n")
    text = text.replace("mov.u32 %r3, 0;\n", "mov.u32 %r3, 0;\nmov.u32 %r6, %r2;\n")
    text = text.replace("st.global.f32 [%rd3], %f1;\n", "st.global.f32 [%rd3], %f1;\nst.global.u32 [%rd3+1024], %r6;\n")
    _, after = executed(text)
    more = {key: after[key] - before[key] for key in after}
    assert more["FMA heavy machine instructions"] >= 2 * TIMES * 0.99
    assert more["special machine instructions"] == 0


def test_numbered_ptx_becomes_the_same_machine_code() -> None:
    def words(text: str) -> list[str]:
        return [word for block in machine_code.compiled(text, "sm_90").blocks for word, _ in block.instructions]

    assert words(LOOP) == words(machine_code.numbered(LOOP))
