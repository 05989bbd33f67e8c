"""Programs that wait for each other: what is too weak to order them, or on the wrong side of a barrier, is noticed."""

import numpy as np
import pytest
import torch

from . import machine, parse, translate
from .faults import faults
from .instructions import Entry
from .memory import GlobalMemory, Report

# Program 0 stores to x, one word a thread, and one of its threads says so in `flag`. One thread of program 1 waits for
# that, and all of them load a word that another warp has stored.
TEXT = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry hand_over(.param .u64 x, .param .u64 flag) .reqntid 64 {
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<4>;
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [flag];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
setp.eq.s32 %p1, %r1, 0;
xor.b32 %r3, %r1, 32;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd3, %rd1, %rd3;
mul.wide.u32 %rd4, %r3, 4;
add.s64 %rd4, %rd1, %rd4;
setp.ne.s32 %p2, %r2, 0;
@%p2 bra $CONSUMER;
add.s32 %r4, %r1, 1;
st.global.b32 [%rd3], %r4;
MEET_BEFORE
@!%p1 bra $DONE;
RELEASE
bra $DONE;
$CONSUMER:
@!%p1 bra $MEET;
$WAIT:
ACQUIRE
setp.lt.s32 %p3, %r5, 1;
@%p3 bra $WAIT;
FENCE
$MEET:
MEET_AFTER
ld.global.b32 %r6, [%rd4];
$DONE:
ret;
}
"""
BARRIER = "bar.sync 0;"
RIGHT = {
    "MEET_BEFORE": BARRIER,
    "RELEASE": "atom.global.gpu.release.add.s32 %r7, [%rd2], 1;",
    "ACQUIRE": "ld.acquire.gpu.global.b32 %r5, [%rd2];",
    "FENCE": "",
    "MEET_AFTER": BARRIER,
}
RELAXED_ADD, RELAXED_LOAD = "atom.global.gpu.relaxed.add.s32 %r7, [%rd2], 1;", "ld.relaxed.gpu.global.b32 %r5, [%rd2];"


def text_of(**changes: str) -> str:
    text = TEXT
    for name, code in (RIGHT | changes).items():
        text = text.replace(name, code)
    return text


def noticed(entry: Entry) -> set[str]:
    program = translate.translate(entry)
    x, flag, report = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), Report()
    spans = [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in (("x", x), ("flag", flag))]
    parameters = {name: np.array([start], "u8").tobytes() for name, start, _ in spans}
    memory = GlobalMemory(spans, spans, report, program.global_grain)
    options = machine.Options(warps=True)
    machine.run_grid(program, (2, 1, 1), parameters, 0, memory, report, options, cooperative=True)
    assert x.tolist() == list(range(1, 65))
    return report.kinds()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"RELEASE": "red.release.sys.global.add.s32 [%rd2], 1;"},
        {"RELEASE": "st.release.gpu.global.b32 [%rd2], 1;"},
        {"ACQUIRE": "atom.global.acq_rel.gpu.add.s32 %r5, [%rd2], 0;"},
        {"RELEASE": f"fence.acq_rel.gpu; {RELAXED_ADD}"},
        {"RELEASE": f"membar.gl; {RELAXED_ADD}"},
        {"ACQUIRE": RELAXED_LOAD, "FENCE": "fence.acq_rel.gpu;"},
        {"ACQUIRE": "ld.volatile.global.b32 %r5, [%rd2];", "FENCE": "membar.sys;"},
    ],
)
def test_what_orders_two_programs(changes: dict[str, str]) -> None:
    assert noticed(parse.parse(text_of(**changes))) == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"RELEASE": RELAXED_ADD},
        {"ACQUIRE": RELAXED_LOAD},
        {"RELEASE": RIGHT["RELEASE"].replace("gpu", "cta")},
        {"ACQUIRE": RIGHT["ACQUIRE"].replace("gpu", "cta")},
        {"RELEASE": f"fence.acq_rel.cta; {RELAXED_ADD}"},
        {"RELEASE": f"{RELAXED_ADD} fence.acq_rel.gpu;"},
        {"ACQUIRE": RELAXED_LOAD, "FENCE": "membar.cta;"},
        {"MEET_BEFORE": ""},
        {"MEET_AFTER": ""},
    ],
)
def test_what_is_too_weak(changes: dict[str, str]) -> None:
    assert "global race between programs" in noticed(parse.parse(text_of(**changes)))


def test_faults_that_weaken_what_orders_are_planted_and_noticed() -> None:
    entry = parse.parse(text_of())
    planted = [fault for fault in faults(entry) if fault.what in ("scope of a program", "no semantics")]
    assert [fault.what for fault in planted] == ["scope of a program", "no semantics"] * 2
    for fault in planted:
        assert "global race between programs" in noticed(fault.applied(entry))
