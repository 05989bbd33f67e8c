"""Warps that hold copies of a value store it to one place: no race, unless the copies differ."""

import pytest

from . import machine, parse, translate
from .memory import GlobalMemory, Report

# Both warps of a program store to the same places, lane by lane, what MINE is.
TEXT = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry store() .reqntid 64 {
.reg .b32 %r<9>;
mov.u32 %r1, %tid.x;
and.b32 %r2, %r1, 31;
shl.b32 %r3, %r2, 4;
mov.u32 %r4, global_smem;
add.u32 %r5, %r4, %r3;
mov.b32 %r6, MINE;
STORE
ret;
}
"""
STORES = {
    "stmatrix": "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r5], {%r6};",
    "st.shared": "st.shared.b32 [%r5], %r6;",
}


@pytest.mark.parametrize("warps", [False, True])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("mine", ["%r2", "%r1"])
def test_copies_that_several_warps_store(store: str, mine: str, warps: bool) -> None:
    report = Report()
    program = translate.translate(parse.parse(TEXT.replace("MINE", mine).replace("STORE", STORES[store])))
    options = machine.Options(warps=warps)
    machine.run_grid(program, (1, 1, 1), {}, 1024, GlobalMemory([], [], report), report, options)
    expected = "shared race between warps: write after write" if warps else "unequal values stored to one place at once"
    assert report.kinds() == (set() if mine == "%r2" else {expected})
