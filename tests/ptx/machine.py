"""Runs a translated program over a grid.

Several programs (CTAs) run at once in a `Pool`, which holds the lanes of all of them. Lanes run in teams: one team of
all lanes in lock-step, which is fast, or one team per warp, in random order between barriers. In a team, lanes at the
same block form a fiber. When the lanes of a fiber diverge, they reconverge at the first block that all their paths pass
(the immediate post-dominator), as on a chip. A fiber that keeps spinning lets the others run.
"""

import random
from dataclasses import dataclass, replace

import numpy as np

from .grid_order import GridOrder
from .memory import Fault, GlobalMemory, Report, SharedMemory
from .team import Team
from .translate import Program

_SHARED_AT_ONCE = 1 << 22  # bytes, of all programs of a pool


@dataclass
class Options:
    """warps: run each warp by itself, in an order drawn from seed, instead of all in lock-step. lanes: about how many
    run at once. max_steps: a pool that executes more blocks counts as hanging."""

    warps: bool = False
    seed: int = 0
    lanes: int = 8192
    races: bool = True
    global_races: bool = True
    traffic: bool = False  # count sectors and bank conflicts
    max_steps: int = 300_000
    copies_land_early: bool = False  # asynchronous copies write at once, not when waited for
    first_lane_wins: bool = False  # where lanes store to one place of shared memory at once; else the last one
    sample: int | None = None  # so many programs of a launch run with warps and races, the others without


def run_grid(
    program: Program,
    grid: tuple,
    parameters: dict,
    n_shared: int,
    memory: GlobalMemory,
    report: Report,
    options: Options,
    cooperative: bool = False,
    descriptors: dict | None = None,
) -> None:
    """All programs of a grid. parameters: name -> bytes. descriptors: name -> what a tensor copy takes."""
    n_programs = grid[0] * grid[1] * grid[2]
    order = list(range(n_programs))
    if options.warps:
        random.Random(options.seed).shuffle(order)
    if options.sample is None or cooperative:
        parts = [(order, options)]
    else:  # The programs at the edges of the grid are among them.
        order.sort(key=lambda number: 0 < number < n_programs - 1)
        rest = replace(options, warps=False, races=False)
        parts = [(order[: options.sample], options), (order[options.sample :], rest)]
    with np.errstate(all="ignore"):
        for numbers, how in parts:
            at_once = _at_once(program, len(numbers), n_shared, how, cooperative)
            for first in range(0, len(numbers), at_once):
                pool = Pool(program, grid, numbers[first : first + at_once], parameters, n_shared, memory, report, how,
                            cooperative, descriptors or {})  # fmt: skip
                pool.run()


def _at_once(program: Program, n_programs: int, n_shared: int, options: Options, cooperative: bool) -> int:
    """How many programs run side by side."""
    if cooperative:
        return n_programs
    # Where each warp runs by itself, the lanes that run at once are one warp of every program.
    by_warp = options.warps and not program.asynchronous
    at_once = min(options.lanes // (32 if by_warp else program.entry.n_threads), _SHARED_AT_ONCE // max(n_shared, 1))
    return max(1, min(n_programs, at_once))


class Pool:
    """Some programs of a grid, which run side by side."""

    def __init__(self, program, grid, numbers, parameters, n_shared, memory, report, options, cooperative, descriptors):
        self.program, self.grid, self.parameters = program, grid, parameters
        self.memory, self.report, self.options, self.cooperative = memory, report, options, cooperative
        self.descriptors = descriptors
        self.numbers = np.array(numbers, np.int64)
        self.n_programs, self.n_threads = len(numbers), program.entry.n_threads
        # As many teams of 4 warps as there are warp groups where matrices are multiplied by those.
        self.shared = SharedMemory(self.n_programs, n_shared, program.grain, report, options.races)
        self.n_shared = n_shared
        # Units written by plain stores since the last fence that lets asynchronous copies and wgmma see them.
        self.unfenced = None
        if program.asynchronous and options.races:
            self.unfenced = np.zeros_like(self.shared.pending, bool)
        self.order = GridOrder(self.n_programs, memory) if cooperative and options.global_races else None
        self.epoch = np.zeros(self.n_programs, np.int64)
        self.live = np.full(self.n_programs, self.n_threads)
        self.arrived: dict[int, np.ndarray] = {}
        self.mbarriers: dict = {}
        self.executed = np.zeros(len(program.functions), np.int64)
        self.random = random.Random(options.seed)
        self.steps = 0
        lanes = np.arange(self.n_programs * self.n_threads)
        if options.warps and (program.asynchronous or cooperative):
            self.teams = [Team(self, some) for some in lanes.reshape(-1, 128 if program.has_warp_groups else 32)]
        elif options.warps:  # The same warp of every program.
            by_warp = lanes.reshape(self.n_programs, -1, 32).swapaxes(0, 1)
            self.teams = [Team(self, some.ravel()) for some in by_warp]
        elif cooperative:  # So that programs that wait for each other take turns.
            self.teams = [Team(self, some) for some in lanes.reshape(self.n_programs, -1)]
        else:
            self.teams = [Team(self, lanes)]

    def run(self) -> None:
        quantum = 40 if self.cooperative else 10_000
        runnable = [t for t in self.teams if t.fibers]
        while runnable:
            if self.options.warps:
                self.random.choice(runnable).run(self.random.randint(1, 6) if self.cooperative else quantum)
            else:
                for team in runnable:
                    team.run(quantum)
            runnable = [t for t in self.teams if t.fibers]
            if not runnable and [True for t in self.teams if t.release_warps()]:
                runnable = [t for t in self.teams if t.fibers]
            if self.steps > self.options.max_steps:
                raise Fault(f"no end after {self.steps} blocks: {[t.where() for t in runnable[:3]]}")
        for team in self.teams:
            team.finish()
        for instruction, register in self.program.too_early:
            self.report.note("accumulator of a wgmma used before its wait", instruction, register)
        waiting = [w for t in self.teams for w in t.waiting]
        if waiting:
            last = self.program.entry.blocks[waiting[0][3]].last
            self.report.note("deadlock", last, f"{len(waiting)} groups of lanes wait, {self.live.tolist()} lanes live")
        for team in self.teams:
            for join in team.open_joins:
                self.report.note(
                    "lanes wait for others that never come", f"block {join.pc}", str(int(join.arrived.sum()))
                )
        for number, times in enumerate(self.executed):
            if times:
                self.report.blocks[number] += int(times)
                for opcode, count in self.program.histograms[number].items():
                    self.report.opcodes[opcode] += int(times) * count

    # --- barriers ---------------------------------------------------------------------------------------------------

    def arrive(self, team: "Team", pc: int, mask: np.ndarray | None, identity: int, n_threads: int, block: int,
               joins: tuple) -> None:  # fmt: skip
        arrived = self.arrived.setdefault(identity, np.zeros(self.n_programs, np.int64))
        team.waiting.append((pc, mask, identity, block, joins))
        if mask is None:
            np.add.at(arrived, team.programs_of_warps, 32)
        else:
            team.converged(mask, block, "barrier reached by a part of a warp", self.program.entry.blocks[block].last)
            np.add.at(arrived, team.program[mask], 1)
        self.release(identity, n_threads)

    def release(self, identity: int, n_threads: int = 0) -> None:
        """Let waiting lanes continue in the programs where all have arrived."""
        arrived = self.arrived.get(identity)
        if arrived is None:
            return
        complete = (arrived > 0) & (arrived >= (n_threads or self.live))
        if not complete.any():
            return
        self.epoch[complete] += 1
        if self.options.races and self.shared.deliveries is not None:
            self.shared.deliveries.barrier(np.flatnonzero(complete).tolist())
        if self.order is not None:
            for program in self.numbers[complete].tolist():
                self.order.barrier(program)
        arrived[complete] = 0
        everywhere = complete.all()
        for team in self.teams:
            if not team.waiting:
                continue
            if not everywhere and not complete[team.programs].any():
                continue
            team.stamp()
            kept = []
            places = set()
            released = []
            for pc, mask, other, block, joins in team.waiting:
                if other != identity:
                    kept.append((pc, mask, other, block, joins))
                    continue
                going = None if everywhere or complete[team.programs].all() else complete[team.program]
                if going is None:
                    released.append((pc, mask, joins))
                    places.add(block)
                    continue
                mask = team.all if mask is None else mask
                if (mask & going).any():
                    places.add(block)
                    released.append((pc, mask & going, joins))
                if (mask & ~going).any():
                    kept.append((pc, mask & ~going, other, block, joins))
            team.waiting = kept
            for each in released:
                team.add(*each)
            if len(places) > 1 and self.n_programs == 1:
                self.report.note("different barriers meet", self.program.entry.blocks[max(places)].last, str(places))

    def left(self, team: "Team", mask: np.ndarray | None) -> None:
        """Note that lanes have ended."""
        if mask is None:
            np.subtract.at(self.live, team.programs_of_warps, 32)
        else:
            np.subtract.at(self.live, team.program[mask], 1)
        for identity in self.arrived:
            self.release(identity)
