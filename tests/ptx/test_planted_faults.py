"""Faults planted in machine code are noticed: a few in a small kernel, and with --mutants hundreds in what ships."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from . import machine, parse, translate
from .faults import Fault, barrier_faults, faults, probes
from .instructions import Entry
from .memory import GlobalMemory, Report
from .test_ptx import run

# 64 threads copy x to y, each from the thread on the other side.
REVERSE = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry reverse(.param .u64 x, .param .u64 y) .reqntid 64 {
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<2>;
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [y];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
ld.global.b32 %r2, [%rd4];
shl.b32 %r3, %r1, 2;
st.shared.b32 [%r3], %r2;
bar.sync 0;
xor.b32 %r4, %r3, 252;
ld.shared.b32 %r5, [%r4];
add.s64 %rd5, %rd2, %rd3;
setp.lt.s32 %p1, %r1, 128;
@%p1 st.global.b32 [%rd5], %r5;
ret;
}
"""
ENTRY = parse.parse(REVERSE)


def execute(entry: Entry) -> tuple[torch.Tensor, set[str]]:
    x, y, report = torch.arange(64.0), torch.zeros(64), Report()
    spans = [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in (("x", x), ("y", y))]
    parameters = {name: np.array([start], "u8").tobytes() for name, start, _ in spans}
    memory = GlobalMemory(spans, spans, report)
    machine.run_grid(translate.translate(entry), (1, 1, 1), parameters, 256, memory, report, machine.Options())
    return y, report.kinds()


def planted(what: str, opcode: str) -> Fault:
    found = [f for f in (*barrier_faults(ENTRY), *faults(ENTRY)) if f.what == what and opcode in f.text]
    assert len(found) == 1
    return found[0]


def test_the_kernel_without_a_fault() -> None:
    y, kinds = execute(ENTRY)
    assert y.tolist() == list(range(63, -1, -1))
    assert kinds == set()


@pytest.mark.parametrize(
    ("what", "opcode", "kind"),
    [
        ("barrier left out", "bar.sync", "shared race between warps: read after write"),
        ("address 16 bytes further", "ld.shared", "shared access outside"),
        ("address 16 bytes further", "st.global", "store outside of memory"),
    ],
)
def test_what_a_check_notices(what: str, opcode: str, kind: str) -> None:
    assert kind in execute(planted(what, opcode).applied(ENTRY))[1]


@pytest.mark.parametrize(("what", "opcode"), [("predicate negated", "st.global"), ("constant one more", "shl.b32")])
def test_what_changes_the_result(what: str, opcode: str) -> None:
    y, kinds = execute(planted(what, opcode).applied(ENTRY))
    assert kinds or y.tolist() != list(range(63, -1, -1))


@pytest.mark.parametrize(
    ("what", "opcode", "why"),
    [
        ("predicate left out", "st.global", "the predicate is true in every lane"),
        ("comparison", "setp", "the value is the same in every lane"),
    ],
)
def test_why_a_fault_has_no_effect(what: str, opcode: str, why: str) -> None:
    fault = planted(what, opcode)
    assert execute(fault.applied(ENTRY))[1] == set()
    probed = probes(ENTRY, fault)
    assert probed is not None
    assert probed[1] == why
    assert execute(probed[0])[1] == set()


def test_a_probe_traps_where_the_value_differs() -> None:
    probed = probes(ENTRY, planted("constant one more", "xor.b32"))
    assert probed is not None
    with pytest.raises(Exception, match="trap"):
        execute(probed[0])


@pytest.mark.mutants
def test_faults_in_what_ships_are_noticed(tmp_path: Path) -> None:
    finished = run(tmp_path / "cache", "-m", "ptx.mutants", "--of-a-kernel", "12")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    summary, n_without = found["summary"], sum("reason" in row for row in found["rows"])
    assert summary["planted"] == summary["noticed"] + summary["missed"] + n_without >= 300
    assert summary["noticed"] >= 0.95 * (summary["planted"] - n_without)
