"""Races between threads of one program are noticed, also between lanes of one warp; what PTX orders is let through."""

import numpy as np
import pytest
import torch

from . import machine, parse, translate
from .memory import GlobalMemory, Report

# 64 threads store to a place of their own and load their neighbour's, by way of shared memory or of global memory.
# %r3 is a thread's own place and %r4 its neighbour's: of the same warp, or the same lane of the other warp.
TEXT = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry exchange(.param .u64 x, .param .u64 y) .reqntid 64 {
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<2>;
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [y];
mov.u32 %r1, %tid.x;
shl.b32 %r3, %r1, 4;
xor.b32 %r4, %r3, NEIGHBOUR;
cvt.u64.u32 %rd3, %r3;
cvt.u64.u32 %rd4, %r4;
add.s64 %rd3, %rd1, %rd3;
add.s64 %rd4, %rd1, %rd4;
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd5, %rd2, %rd5;
CODE
ret;
}
"""
STORES = {
    "shared": ("st.shared.b32 [%r3], %r1;", "ld.shared.b32 %r5, [%r4];"),
    "global": ("st.global.b32 [%rd3], %r1;", "ld.global.b32 %r5, [%rd4];"),
    "stmatrix": ("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r1, %r1, %r1, %r1};", "ld.shared.b32 %r5, [%r4];"),
    "ldmatrix": ("st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};",
                 "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3];"),
    "cp.async": ("cp.async.ca.shared.global [%r3], [%rd3], 16; cp.async.commit_group; cp.async.wait_group 0;",
                 "ld.shared.b32 %r5, [%r4];"),
}  # fmt: skip
SHUFFLE = "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"
WARP_SYNC, BARRIER = "bar.warp.sync -1;", "bar.sync 0;"
OF_THE_WARP, OF_THE_OTHER_WARP = 16, 512


def execute(code: str, neighbour: int, report: Report, options: machine.Options, grid: tuple = (1, 1, 1)) -> None:
    program = translate.translate(parse.parse(TEXT.replace("CODE", code).replace("NEIGHBOUR", str(neighbour))))
    x, y = torch.zeros(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    spans = [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in (("x", x), ("y", y))]
    parameters = {name: np.array([start], "u8").tobytes() for name, start, _ in spans}
    memory = GlobalMemory(spans, spans, report, program.global_grain)
    machine.run_grid(program, grid, parameters, 1024, memory, report, options)


def kinds(code: str, neighbour: int) -> set[str]:
    """What is noticed in warps that run one by one, in both orders of the two."""
    report = Report()
    for seed in range(2):
        execute(code, neighbour, report, machine.Options(warps=True, seed=seed))
    return report.kinds()


@pytest.mark.parametrize("space", STORES)
@pytest.mark.parametrize("between", ["", SHUFFLE])
def test_a_lane_that_reads_what_another_wrote(space: str, between: str) -> None:
    store, load = STORES[space]
    memory = "global" if space == "global" else "shared"
    assert kinds(store + between + load, OF_THE_WARP) == {f"{memory} race between lanes of a warp: read after write"}
    assert kinds(store + between + WARP_SYNC + load, OF_THE_WARP) == set()


@pytest.mark.parametrize("space", ["shared", "global"])
def test_a_lane_that_overwrites_what_another_read(space: str) -> None:
    store, load = STORES[space]
    before = store + BARRIER + load
    assert kinds(before + store, OF_THE_WARP) == {f"{space} race between lanes of a warp: write after read"}
    assert kinds(before + WARP_SYNC + store, OF_THE_WARP) == set()


@pytest.mark.parametrize("space", ["shared", "global"])
def test_a_warp_needs_a_barrier_to_read_what_another_wrote(space: str) -> None:
    store, load = STORES[space]
    found = kinds(store + WARP_SYNC + load, OF_THE_OTHER_WARP)
    # Which of the two accesses comes first depends on which warp runs first.
    assert f"{space} race between warps: read after write" in found
    assert kinds(store + BARRIER + load, OF_THE_OTHER_WARP) == set()


@pytest.mark.parametrize("space", ["shared", "global"])
def test_many_readers_are_all_remembered(space: str) -> None:
    """All lanes read the word of lane 0, which then writes it."""
    address = "%r6" if space == "shared" else "%rd6"
    code = f"mov.u32 %r6, 0; mov.b64 %rd6, %rd1; {STORES[space][0]} {BARRIER} ld.{space}.b32 %r5, [{address}];"
    overwrite = f"setp.eq.s32 %p1, %r1, 0; @%p1 st.{space}.b32 [{address}], %r1;"
    # Of the other warp before or after, depending on which runs first.
    expected = {f"{space} race between warps: {what}" for what in ("write after read", "read after write")}
    assert kinds(code + overwrite, OF_THE_WARP) >= expected
    assert kinds(code + BARRIER + overwrite, OF_THE_WARP) == set()


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize(("value", "expected"), [("%r1", {"unequal values stored to one place at once"}), ("7", set())])
def test_lanes_that_store_to_one_word_at_once(space: str, value: str, expected: set[str]) -> None:
    address = "%r6" if space == "shared" else "%rd3"
    place = "shr.u32 %r6, %r1, 5; shl.b32 %r6, %r6, 4; cvt.u64.u32 %rd3, %r6; add.s64 %rd3, %rd1, %rd3;"
    assert kinds(f"{place} mov.b32 %r5, {value}; st.{space}.b32 [{address}], %r5;", OF_THE_WARP) == expected


@pytest.mark.parametrize(("sample", "n_checked"), [(None, 6), (3, 3), (1, 1)])
def test_a_sample_of_programs_is_checked(sample: int | None, n_checked: int) -> None:
    report = Report()
    code = "".join(STORES["shared"])
    execute(code, OF_THE_WARP, report, machine.Options(warps=True, sample=sample), grid=(6, 1, 1))
    assert [times for times, _ in report.problems.values()] == [64 * n_checked]
