"""What a tensor copy brings may be touched by warps that waited for it, and by all after the next barrier."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from . import machine, parse, translate
from .memory import GlobalMemory, Report
from .team import PARAMETER_BASE

# Two warps. The first thread asks for a copy of 32 words to the start of shared memory. CODE waits for it and leaves in
# %r5 the word of the thread's lane, which goes to y.
TEXT = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 128 .b8 global_smem[];
.visible .entry copy(.param .align 64 .b8 x[128], .param .u64 y) .reqntid 64 {
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<5>;
mov.b64 %rd1, x;
ld.param.u64 %rd2, [y];
mov.u32 %r1, %tid.x;
mov.u32 %r2, 128;
mov.u32 %r3, 0;
and.b32 %r4, %r1, 31;
shl.b32 %r4, %r4, 2;
setp.eq.s32 %p1, %r1, 0;
setp.lt.s32 %p2, %r1, 32;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 128;
@%p1 cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1, {%r3}], [%r2];
CODE
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd5, %rd2, %rd5;
st.global.b32 [%rd5], %r5;
ret;
}
"""
WAIT = "{wait}: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra {wait};"
ALL_WAIT = WAIT.format(wait="$wait")
FIRST_WAITS = "@!%p2 bra $on; " + ALL_WAIT + " $on:"
LOAD, STORE, BARRIER = "ld.shared.b32 %r5, [%r4];", "st.shared.b32 [%r4], %r1;", "bar.sync 0;"


def execute(code: str, seed: int, **options: bool) -> tuple[set[str], torch.Tensor]:
    """What was noticed, and y."""
    program = translate.translate(parse.parse(TEXT.replace("CODE", code)))
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    spans = [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in (("x", x), ("y", y))]
    report = Report()
    memory = GlobalMemory(spans, spans, report, 1)
    parameters = {"x": bytes(128), "y": np.array([y.data_ptr()], "u8").tobytes()}
    tensor = SimpleNamespace(
        address=x.data_ptr(), element=4, shape=(32,), strides=(1,), box=(32,), swizzle=0, nan=False
    )
    place = PARAMETER_BASE + program.entry.parameters["x"][2]
    chosen = machine.Options(seed=seed, **{"warps": True} | options)
    machine.run_grid(program, (1, 1, 1), parameters, 1024, memory, report, chosen, descriptors={place: tensor})
    return report.kinds(), y


@pytest.mark.parametrize("code", [ALL_WAIT, FIRST_WAITS + BARRIER])
@pytest.mark.parametrize("seed", range(4))
def test_warps_that_waited_read_what_was_copied(code: str, seed: int) -> None:
    found, y = execute(code + LOAD, seed)
    assert found == set()
    assert y.tolist() == 2 * list(range(32))


@pytest.mark.parametrize("warps", [False, True])
def test_without_races_copies_arrive_and_nothing_is_kept(warps: bool) -> None:
    found, y = execute(ALL_WAIT + LOAD, 0, warps=warps, races=False)
    assert found == set()
    assert y.tolist() == 2 * list(range(32))


@pytest.mark.parametrize(("access", "done"), [(LOAD, "read"), ("@!%p2 " + STORE, "overwritten")])
def test_a_warp_that_has_not_waited_is_noticed(access: str, done: str) -> None:
    """Whichever runs first: before its arrival a copy is in flight, and afterwards nobody told the second warp."""
    kinds = [execute(FIRST_WAITS + access, seed)[0] for seed in range(8)]
    assert all(kinds)
    assert {f"tensor copy {done} by a warp that has not waited for it"} in kinds
