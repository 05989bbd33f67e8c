"""Runs a translated program over a grid.

Several programs (CTAs) run at once in a `Pool`, which holds the lanes of all of them. Lanes run in teams: one team of
all lanes in lock-step, which is fast, or one team per warp, in random order between barriers. In a team, lanes at the
same block form a fiber. When the lanes of a fiber diverge, they reconverge at the first block that all their paths pass
(the immediate post-dominator), as on a chip. A fiber that keeps spinning lets the others run.
"""

import operator
import random
from dataclasses import dataclass

import numpy as np

from . import matrix
from .hopper import Hopper
from .memory import Fault, GlobalMemory, GridOrder, Report, SharedMemory
from .translate import Program

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
_KINDS = {k: np.dtype(k.replace("s", "i") if k[0] == "s" else k) for k in
          ("u1", "u2", "u4", "u8", "s1", "s2", "s4", "s8", "f2", "f4", "f8")}  # fmt: skip
_ATOMICS = {
    "add": operator.add, "min": min, "max": max,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip
# Where parameters that are descriptors seem to lie.
_PARAMETER_BASE = 0x70000000


@dataclass
class Options:
    """warps: run each warp by itself, in an order drawn from seed, instead of all in lock-step. lanes: about how many
    run at once. max_steps: a pool that executes more blocks is said to hang."""

    warps: bool = False
    seed: int = 0
    lanes: int = 2048
    races: bool = True
    uninitialised: bool = True
    global_races: bool = True
    traffic: bool = False  # count sectors and bank conflicts
    max_steps: int = 300_000
    copies_land_early: bool = False  # asynchronous copies write at once, not when waited for
    first_lane_wins: bool = False  # where lanes store to one place of shared memory at once; else the last one


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
    n_threads = program.entry.n_threads
    n_programs = grid[0] * grid[1] * grid[2]
    at_once = n_programs if cooperative else max(1, min(n_programs, options.lanes // n_threads))
    order = list(range(n_programs))
    if options.warps:
        random.Random(options.seed).shuffle(order)
    with np.errstate(all="ignore"):
        for first in range(0, n_programs, at_once):
            pool = Pool(program, grid, order[first : first + at_once], parameters, n_shared, memory, report, options,
                        cooperative, descriptors or {})  # fmt: skip
            pool.run()


class Pool:
    """Some programs of a grid, which run side by side."""

    def __init__(self, program, grid, numbers, parameters, n_shared, memory, report, options, cooperative, descriptors):
        self.program, self.grid, self.parameters = program, grid, parameters
        self.memory, self.report, self.options, self.cooperative = memory, report, options, cooperative
        self.descriptors = descriptors
        self.numbers = np.array(numbers)
        self.n_programs, self.n_threads = len(numbers), program.entry.n_threads
        # As many teams of 4 warps as there are warp groups where matrices are multiplied by those.
        self.shared = SharedMemory(self.n_programs, n_shared, program.grain, report, options.races,
                                   options.uninitialised)  # fmt: skip
        self.n_shared = n_shared
        # Units written by plain stores since the last fence that lets asynchronous copies and wgmma see them.
        asynchronous = any(o.startswith(("wgmma", "cp.async.bulk")) for h in program.histograms for o in h)
        self.unfenced = (
            np.zeros_like(self.shared.written) if asynchronous and options.races and options.uninitialised else None
        )
        self.order = GridOrder(self.n_programs, report) if cooperative and options.global_races else None
        self.epoch = np.zeros(self.n_programs, np.int32)
        self.live = np.full(self.n_programs, self.n_threads)
        self.arrived: dict[int, np.ndarray] = {}
        self.mbarriers: dict = {}
        self.executed = np.zeros(len(program.functions), np.int64)
        self.random = random.Random(options.seed)
        self.steps = 0
        n_lanes = self.n_programs * self.n_threads
        if options.warps:
            uses_groups = any("wgmma" in h for hist in program.histograms for h in hist)
            width = 128 if uses_groups else 32
            self.teams = [Team(self, first, width) for first in range(0, n_lanes, width)]
        elif cooperative:  # So that programs that wait for each other take turns.
            self.teams = [Team(self, first, self.n_threads) for first in range(0, n_lanes, self.n_threads)]
        else:
            self.teams = [Team(self, 0, n_lanes)]

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
        arrived[complete] = 0
        everywhere = complete.all()
        for team in self.teams:
            if not team.waiting:
                continue
            if not everywhere and not complete[team.programs].any():
                continue
            team.epochs = self.epoch[team.program]
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


@dataclass(eq=False)
class Fiber:
    """Lanes of a team that are at the same block. mask: None means all lanes."""

    pc: int
    mask: np.ndarray | None
    joins: tuple = ()  # of `Join`, the innermost last


@dataclass(eq=False)
class Join:
    """Where diverged lanes reconverge. expected: the lanes that still have to come, without those that ended."""

    pc: int
    expected: np.ndarray
    arrived: np.ndarray
    parents: tuple


class Team(Hopper):
    """Lanes that share registers as arrays. Methods without an underscore are what translated blocks call."""

    def __init__(self, pool: Pool, first: int, width: int):
        self.pool, self.width = pool, width
        lanes = np.arange(first, first + width)
        self.program = lanes // pool.n_threads  # within the pool
        self.programs = np.unique(self.program)
        self.thread = (lanes % pool.n_threads).astype(u4)
        self.warp = (lanes // 32).astype(np.int32)
        self.n_warps = width // 32
        self.programs_of_warps = self.program[::32]
        self.lane = np.arange(width) % 32
        self.base = self.program.astype(np.int64) * pool.shared.n_bytes
        self.global_program = pool.numbers[self.program].astype(np.int32)
        self.epochs = pool.epoch[self.program]
        self.all = np.ones(width, bool)
        self.true, self.false = self.all, np.zeros(width, bool)
        zeros = {k: np.zeros(width, d) for k, d in _KINDS.items()} | {"p": self.false}
        self.registers = [zeros[k] for k in pool.program.kinds]
        self.fibers: list[Fiber] = [Fiber(0, None)]
        self.waiting: list = []
        self.open_joins: list[Join] = []
        self.caches: dict = {}
        # Asynchronous copies: not yet in a group, and the groups that were not waited for.
        self.loose_copies: list = []
        self.copy_groups: list = []
        self.loose_stores: list = []
        self.store_groups: list = []
        self.loose_products: list = []
        self.product_groups: list = []
        self.sites = pool.program.sites
        self.spun = 0

    def where(self) -> list:
        return [f.pc for f in self.fibers]

    # --- control ----------------------------------------------------------------------------------------------------

    def add(self, pc: int, mask: np.ndarray | None, joins: tuple = ()) -> None:
        """Let lanes continue at a block, together with those that are there already."""
        if mask is not None and mask.all():
            mask = None
        while joins and joins[-1].pc == pc:
            join = joins[-1]
            join.arrived = join.arrived | (self.all if mask is None else mask)
            if (join.arrived != join.expected).any():
                return
            self.open_joins.remove(join)
            mask, joins = None if join.expected.all() else join.expected, join.parents
        for fiber in self.fibers:
            if fiber.pc == pc and fiber.mask is not None and mask is not None and fiber.joins == joins:
                merged = fiber.mask | mask
                fiber.mask = None if merged.all() else merged
                return
        self.fibers.append(Fiber(pc, mask, joins))

    def part(self, fiber: Fiber, pc: int, taken: np.ndarray, target: int) -> None:
        """Some lanes branch, the others do not."""
        self.fibers.remove(fiber)
        mask = self.all if fiber.mask is None else fiber.mask
        meeting, joins = self.pool.program.joins[pc], fiber.joins
        if meeting is not None and not (joins and joins[-1].pc == meeting):
            join = Join(meeting, mask, self.false, joins)
            self.open_joins.append(join)
            joins = (*joins, join)
        self.add(target, taken, joins)
        self.add(pc + 1, mask & ~taken, joins)

    def leave(self, joins: tuple, mask: np.ndarray | None) -> None:
        """Remove lanes that have ended from every place where they are expected."""
        for join in reversed(joins):
            join.expected = join.expected & ~(self.all if mask is None else mask)
            if join in self.open_joins and join.expected.any() and (join.arrived == join.expected).all():
                self.open_joins.remove(join)
                self.add(join.pc, join.expected, join.parents)
            elif not join.expected.any() and join in self.open_joins:
                self.open_joins.remove(join)

    def release_warps(self) -> bool:
        """Called when no lane can continue: whole warps need not wait for other warps."""
        for join in reversed(self.open_joins):
            missing = (join.expected & ~join.arrived).reshape(-1, 32).any(1)
            going = join.arrived & ~np.repeat(missing, 32)
            if going.any():
                join.expected, join.arrived = join.expected & ~going, join.arrived & ~going
                self.add(join.pc, going, join.parents)
                return True
        return False

    def run(self, quantum: int) -> None:
        pool = self.pool
        functions, ends, executed, registers = pool.program.functions, pool.program.ends, pool.executed, self.registers
        for _ in range(quantum):
            if not self.fibers:
                return
            fibers = self.fibers
            if len(fibers) == 1:
                fiber, self.spun = fibers[0], 0
            else:
                fiber = min(fibers, key=lambda f: f.pc)
                self.spun += 1
                if self.spun > 5000:  # Whoever spins at the lowest block may wait for one of the others.
                    self.spun = 0
                    fiber = pool.random.choice(fibers)
            pc, mask = fiber.pc, fiber.mask
            pool.steps += 1
            executed[pc] += self.n_warps if mask is None else int(mask.reshape(-1, 32).any(1).sum())
            condition = functions[pc](registers, self, mask)
            end = ends[pc]
            kind = end[0]
            if kind == "next":
                self._go(fiber, pc + 1)
            elif kind == "branch":
                if condition is None:
                    self._go(fiber, end[1])
                    continue
                taken = condition if mask is None else condition & mask
                n_taken = np.count_nonzero(taken)
                if n_taken == 0:
                    self._go(fiber, pc + 1)
                elif n_taken == (self.width if mask is None else np.count_nonzero(mask)):
                    self._go(fiber, end[1])
                else:
                    self.part(fiber, pc, taken, end[1])
            elif kind == "barrier":
                fibers.remove(fiber)
                pool.arrive(self, pc + 1, mask, end[1], end[2], pc, fiber.joins)
            else:  # exit
                fibers.remove(fiber)
                if condition is None:
                    self.leave(fiber.joins, mask)
                    pool.left(self, mask)
                else:
                    leaving = condition if mask is None else condition & mask
                    staying = ~condition if mask is None else mask & ~condition
                    if leaving.any():
                        self.leave(fiber.joins, leaving)
                        pool.left(self, leaving)
                    if staying.any():
                        self.add(pc + 1, staying, fiber.joins)
            if pool.steps > pool.options.max_steps:
                return

    def _go(self, fiber: Fiber, pc: int) -> None:
        if not fiber.joins and len(self.fibers) == 1:
            fiber.pc = pc
            return
        if (fiber.joins and fiber.joins[-1].pc == pc) or len(self.fibers) > 1:
            self.fibers.remove(fiber)
            self.add(pc, fiber.mask, fiber.joins)
        else:
            fiber.pc = pc

    # --- values -----------------------------------------------------------------------------------------------------

    def both(self, mask, chosen):
        """The lanes in both masks. None means all lanes."""
        if mask is None:
            return None if chosen.all() else chosen
        return mask & chosen

    def constant(self, kind, bits):
        key = kind, bits
        if key not in self.caches:
            one = np.array([bits], f"u{kind[1]}").view(_KINDS[kind])[0]
            self.caches[key] = np.full(self.width, one)
        return self.caches[key]

    def parameter(self, name, offset, kind):
        key = name, offset, kind
        if key not in self.caches:
            dtype = _KINDS[kind]
            one = np.frombuffer(self.pool.parameters[name], dtype, 1, offset)[0]
            self.caches[key] = np.full(self.width, one)
        return self.caches[key]

    def address_of(self, name, kind, width):
        """0 for shared memory; for a parameter that is a descriptor, a number that stands for it."""
        symbols = self.pool.program.entry.symbols
        if name in symbols and symbols[name][0] == "shared":
            return self.constant(f"u{width}", 0).view(_KINDS[kind])
        if name in self.pool.program.entry.parameters:
            place = _PARAMETER_BASE + self.pool.program.entry.parameters[name][2]
            return self.constant(f"u{width}", place).view(_KINDS[kind])
        raise Fault(f"the address of {name} is not known")

    def special(self, name):
        if name not in self.caches:
            grid, number = self.pool.grid, self.pool.numbers[self.program]
            one = {
                "%tid.x": lambda: self.thread, "%tid.y": lambda: self.thread * 0, "%tid.z": lambda: self.thread * 0,
                "%ntid.x": lambda: np.full(self.width, self.pool.n_threads),
                "%ctaid.x": lambda: number % grid[0], "%ctaid.y": lambda: number // grid[0] % grid[1],
                "%ctaid.z": lambda: number // (grid[0] * grid[1]),
                "%nctaid.x": lambda: np.full(self.width, grid[0]), "%nctaid.y": lambda: np.full(self.width, grid[1]),
                "%nctaid.z": lambda: np.full(self.width, grid[2]),
                "%laneid": lambda: self.lane, "%warpid": lambda: self.thread // 32,
                "%cluster_ctarank": lambda: np.zeros(self.width), "%cluster_ctaid.x": lambda: np.zeros(self.width),
            }.get(name)  # fmt: skip
            if one is None:
                raise Fault(f"the register {name} is not known")
            self.caches[name] = np.ascontiguousarray(one()).astype(u4)
        return self.caches[name]

    def converged(self, mask, site, kind="lanes of a warp are missing in a .sync instruction", instruction=None):
        """All lanes of a warp or none."""
        if mask is None:
            return
        by_warp = mask.reshape(-1, 32)
        if (by_warp.any(1) != by_warp.all(1)).any():
            self.pool.report.note(
                kind, instruction or self.sites[site], f"lanes {np.flatnonzero(mask)[:8].tolist()}..."
            )

    def trap(self, mask, site):
        if mask is None or mask.any():
            self.pool.report.note("trap", self.sites[site], "")
            raise Fault(f"trap: {self.sites[site]}")

    # --- lanes ------------------------------------------------------------------------------------------------------

    def shuffle(self, mode, b, c):
        key = "shuffle", mode, b, c
        if key not in self.caches:
            self.caches[key] = self.shuffle_by(mode, np.full(self.width, b, u4), np.full(self.width, c, u4))
        return self.caches[key]

    def shuffle_by(self, mode, b, c):
        """The lane from which each lane takes its value, and whether that lane is in its segment."""
        lane = self.lane
        b, c = b.astype(np.int64) & 31, c.astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        highest = (lane & segment) | (clamp & ~segment & 31)
        lowest = lane & segment
        if mode == "up":
            source = lane - b
            inside = source >= highest
        elif mode == "down":
            source = lane + b
            inside = source <= highest
        elif mode == "bfly":
            source = lane ^ b
            inside = source <= highest
        else:
            source = lowest | (b & ~segment)
            inside = source <= highest
        source = np.where(inside, source, lane)
        return np.arange(self.width) - lane + source, inside

    def reduce(self, operation, values, mask):
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                    "xor": np.bitwise_xor}[operation]  # fmt: skip
        result = function.reduce(values.reshape(-1, 32), axis=1, dtype=values.dtype)
        return np.repeat(result, 32)

    def vote(self, mode, chosen, mask):
        chosen = chosen if mask is None else chosen & mask
        by_warp = chosen.reshape(-1, 32)
        if mode == "ballot":
            return np.repeat((by_warp.astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4), 32)
        if mode == "any":
            return np.repeat(by_warp.any(1), 32)
        missing = 0 if mask is None else ~mask.reshape(-1, 32)
        if mode == "all":
            return np.repeat((by_warp | missing).all(1), 32)
        return np.repeat((by_warp | missing).all(1) | ~by_warp.any(1), 32)

    def elect(self, mask):
        if mask is None:
            return self.lane == 0
        by_warp = mask.reshape(-1, 32)
        first = np.zeros_like(by_warp)
        rows = np.flatnonzero(by_warp.any(1))
        first[rows, by_warp[rows].argmax(1)] = True
        return first.ravel()

    # --- global memory ----------------------------------------------------------------------------------------------

    def load_global(self, address, mask, size, count, site):
        places = None if mask is None else np.flatnonzero(mask)
        chosen = address if places is None else address[places]
        instruction = self.sites[site]
        result = None
        for region, some in self.pool.memory.split(chosen, size * count, instruction, "load"):
            offsets = chosen if some is None else chosen[some]
            rows = (offsets - u8(region.start & ~15)) // u8(size * count)
            found = region.view(size, count)[rows.astype(np.int64)]
            if places is None and some is None:
                result = found
            else:
                if result is None:
                    result = np.zeros((self.width, count) if count > 1 else self.width, found.dtype)
                result[(places if some is None else places[some]) if places is not None else some] = found
            if self.pool.options.global_races:
                lanes = self._lanes(places, some)
                self._mark(region, offsets, size, count, lanes, False, instruction)
        if self.pool.options.traffic:
            self._count_sectors(chosen, places, size * count, "load")
        if result is None:
            result = np.zeros((self.width, count) if count > 1 else self.width, f"u{size}")
        return (result,) if count == 1 else result.T

    def store_global(self, address, mask, size, values, site):
        places = None if mask is None else np.flatnonzero(mask)
        chosen = address if places is None else address[places]
        count, instruction = len(values), self.sites[site]
        for region, some in self.pool.memory.split(chosen, size * count, instruction, "store"):
            offsets = chosen if some is None else chosen[some]
            lanes = self._lanes(places, some)
            rows = ((offsets - u8(region.start & ~15)) // u8(size * count)).astype(np.int64)
            view = region.view(size, count)
            unchanged = None
            if self.pool.order is not None:
                before = view[rows] if count > 1 else view[rows][:, None]
                unchanged = np.logical_and.reduce(
                    [before[:, i] == (w if lanes is None else w[lanes]) for i, w in enumerate(values)]
                )
            if count == 1:
                view[rows] = values[0] if lanes is None else values[0][lanes]
            else:
                for i, word in enumerate(values):
                    view[rows, i] = word if lanes is None else word[lanes]
            if self.pool.options.global_races:
                self._mark(region, offsets, size, count, lanes, True, instruction, unchanged)
        if self.pool.options.traffic:
            self._count_sectors(chosen, places, size * count, "store")

    @staticmethod
    def _lanes(places, some):
        if places is None:
            return some
        return places if some is None else places[some]

    def _mark(self, region, addresses, size, count, lanes, writes, instruction, unchanged=None):
        if self.pool.order is not None:
            if "acquire" in instruction.opcode:
                for address in np.unique(addresses):
                    self.pool.order.acquire(int(self.programs[0]), int(address))
            elif not any(word in instruction.opcode for word in ("volatile", "relaxed", "release")):
                first = (addresses - u8(region.start)).astype(np.int64)
                for i in range(count):
                    self.pool.order.mark(
                        region, first + size * i, int(self.programs[0]), writes, unchanged, instruction
                    )
            return
        if len(self.programs) == 1 and self.pool.grid[0] * self.pool.grid[1] * self.pool.grid[2] == 1:
            return
        first = (addresses - u8(region.start)).astype(np.int64)
        programs = self.global_program if lanes is None else self.global_program[lanes]
        for i in range(count):
            self.pool.memory.mark(region, first + size * i, programs, writes, instruction)

    def _count_sectors(self, chosen, places, n_bytes, what):
        counts = self.pool.report.counts
        warps = self.warp if places is None else self.warp[places]
        counts[f"global {what} bytes"] += chosen.size * n_bytes
        step = np.arange(0, n_bytes, min(n_bytes, 32), dtype=u8)
        sectors = ((chosen[:, None] + step) >> u8(5)).astype(np.int64)
        keys = sectors + (warps[:, None].astype(np.int64) << 48)
        counts[f"global {what} sectors"] += np.unique(keys).size

    def atomic(self, space, operation, kind, address, mask, words, site):
        """Execute lane after lane. Returns what was in memory before."""
        places = np.arange(self.width) if mask is None else np.flatnonzero(mask)
        instruction = self.sites[site]
        if kind not in _KINDS:
            raise Fault(f"instruction not known: {instruction}")
        dtype = _KINDS[f"u{kind[1]}"]
        result = np.zeros(self.width, dtype)
        size = dtype.itemsize
        order = self.pool.order if space == "global" else None
        for lane in places:
            if order is not None:
                if "release" in instruction.opcode or "acq_rel" in instruction.opcode:
                    order.release(int(self.program[lane]), int(address[lane]))
                if "acquire" in instruction.opcode or "acq_rel" in instruction.opcode:
                    order.acquire(int(self.program[lane]), int(address[lane]))
            if space == "global":
                found = self.pool.memory.split(address[lane : lane + 1], size, instruction, "atomic")
                if not found:
                    continue
                region = found[0][0]
                view, row = region.view(size, 1), (int(address[lane]) - (region.start & ~15)) // size
            else:
                place = int(address[lane]) + int(self.base[lane])
                view, row = self.pool.shared.view(size, 1), place // size
            old = view[row]
            given = [w[lane] for w in words]
            before, value = old.view(_KINDS[kind]), given[-1].view(_KINDS[kind])
            if operation == "cas":
                new = given[1] if old == given[0] else old
            elif operation == "exch":
                new = given[0]
            else:
                new = _ATOMICS[operation](before, value)
                new = np.array(new, _KINDS[kind]).view(dtype)[()]
            view[row] = new
            result[lane] = old
        self.pool.report.counts["atomics"] += places.size
        return result

    # --- shared memory ----------------------------------------------------------------------------------------------

    def _places(self, address, mask, n_bytes, site):
        """(positions in shared memory, lanes or None). Positions outside are left out."""
        lanes = None if mask is None else np.flatnonzero(mask)
        offset = address.astype(np.int64)
        base = self.base
        if lanes is not None:
            offset, base = offset[lanes], base[lanes]
        bad = (offset + n_bytes > self.pool.n_shared) | (offset % n_bytes != 0)
        if bad.any():
            one = int(offset[bad][0])
            kind = "shared access misaligned" if one % n_bytes else "shared access outside"
            self.pool.report.note(kind, self.sites[site], f"byte {one} of {self.pool.n_shared}", int(bad.sum()))
            good = np.flatnonzero(~bad)
            lanes = good if lanes is None else lanes[good]
            offset, base = offset[good], base[good]
        return offset + base, lanes

    def load_shared(self, address, mask, size, count, site):
        n_bytes = size * count
        places, lanes = self._places(address, mask, n_bytes, site)
        found = self.pool.shared.view(size, count)[places >> (n_bytes.bit_length() - 1)]
        self._read(places, lanes, n_bytes, site)
        if lanes is not None:
            result = np.zeros((self.width, count) if count > 1 else self.width, found.dtype)
            result[lanes] = found
            found = result
        return (found,) if count == 1 else found.T

    def store_shared(self, address, mask, size, values, site):
        count = len(values)
        n_bytes = size * count
        places, lanes = self._places(address, mask, n_bytes, site)
        view = self.pool.shared.view(size, count)
        rows = places >> (n_bytes.bit_length() - 1)
        given = [v if lanes is None else v[lanes] for v in values]
        unchanged = None
        if self.pool.options.races:
            before = view[rows] if count > 1 else view[rows][:, None]
            unchanged = np.logical_and.reduce([before[:, i] == word for i, word in enumerate(given)])
        order = slice(None, None, -1) if self.pool.options.first_lane_wins else slice(None)
        if count == 1:
            view[rows[order]] = given[0][order]
        else:
            for i, word in enumerate(given):
                view[rows[order], i] = word[order]

        self._wrote(places, lanes, n_bytes, site, unchanged)
        if self.pool.options.races:
            stored = view[rows] if count > 1 else view[rows][:, None]
            for i, word in enumerate(given):
                unequal = stored[:, i] != word
                if unequal.any():
                    one = int(np.flatnonzero(unequal)[0])
                    others = np.flatnonzero(rows == rows[one])
                    self.pool.report.note(
                        "unequal values stored to one place at once",
                        self.sites[site],
                        f"byte {int(places[one]) % self.pool.shared.n_bytes}, bits "
                        f"{sorted({hex(int(v)) for v in word[others]})[:4]}",
                        int(unequal.sum()),
                    )

    def _read(self, places, lanes, n_bytes, site):
        options = self.pool.options
        if options.races or options.uninitialised:
            warp, epochs = (self.warp, self.epochs) if lanes is None else (self.warp[lanes], self.epochs[lanes])
            self.pool.shared.read(places, n_bytes, warp, epochs, self.sites[site])
        if options.traffic:
            self._count_banks(places, lanes, n_bytes, "load")

    def _wrote(self, places, lanes, n_bytes, site, unchanged=None):
        self._in_flight(places, n_bytes, site)
        options = self.pool.options
        if options.races or options.uninitialised:
            warp, epochs = (self.warp, self.epochs) if lanes is None else (self.warp[lanes], self.epochs[lanes])
            self.pool.shared.write(places, n_bytes, warp, epochs, self.sites[site], unchanged=unchanged)
            if self.pool.unfenced is not None:
                self.pool.unfenced[self.pool.shared.units(places, n_bytes)] = True
        if options.traffic:
            self._count_banks(places, lanes, n_bytes, "store")

    def _count_banks(self, places, lanes, n_bytes, what):
        """How many passes over the 32 banks a warp's access takes, and how many its bytes need."""
        warp = self.warp if lanes is None else self.warp[lanes]
        lane = self.lane if lanes is None else self.lane[lanes]
        words = max(1, n_bytes // 4)
        phase = warp.astype(np.int64) * 4 + lane * words // 32  # 16 bytes a lane go as four quarters
        keys = (phase[:, None] << 40) + (places[:, None] // 4 + np.arange(words))
        distinct = np.unique(keys)
        banks = (distinct >> 40) * 32 + distinct % 32
        first = int(banks.min()) // 32
        loads = np.bincount(banks - first * 32)
        loads = np.concatenate([loads, np.zeros(-loads.size % 32, loads.dtype)]).reshape(-1, 32).max(1)
        counts = self.pool.report.counts
        counts[f"shared {what} passes"] += int(loads.sum())
        counts[f"shared {what} least passes"] += int((loads > 0).sum())

    # --- asynchronous copies ----------------------------------------------------------------------------------------

    def copy(self, to, of, mask, size, taken, site):
        """cp.async: copy `taken` bytes from global memory, and zeros up to size. They arrive when a lane waits."""
        places, lanes = self._places(to, mask, size, site)
        if places.size == 0:
            return
        data = np.zeros((places.size, size), u1)
        source = of if lanes is None else of[lanes]
        wanted = np.full(places.size, size) if taken is None else (taken if lanes is None else taken[lanes]).astype(int)
        if (wanted > size).any():
            self.pool.report.note("cp.async takes more than its size", self.sites[site], str(int(wanted.max())))
        for n_bytes in np.unique(wanted):
            if n_bytes == 0:
                continue
            rows = np.flatnonzero(wanted == n_bytes)
            step = int(n_bytes) if n_bytes in (4, 8, 16) else 1
            for start in range(0, int(n_bytes), step):
                for region, some in self.pool.memory.split(source[rows] + u8(start), step, self.sites[site], "load"):
                    chosen = rows if some is None else rows[some]
                    offsets = (source[chosen] + u8(start) - u8(region.start & ~15)) // u8(step)
                    width = min(step, 8)
                    found = region.view(width, step // width)[offsets.astype(np.int64)]
                    data[chosen, start : start + step] = np.ascontiguousarray(found).view(u1).reshape(-1, step)
        if self.pool.options.traffic:
            some = np.flatnonzero(wanted)
            self._count_sectors(source[some], some if lanes is None else lanes[some], size, "load")
            self._count_banks(places, lanes, size, "store")
        warp, epochs = (self.warp, self.epochs) if lanes is None else (self.warp[lanes], self.epochs[lanes])
        if self.pool.order is not None:
            self._mark_copies(source[wanted > 0], size, site)
        self._in_flight(places, size, site)
        self.pool.shared.begin_copy(places, size, warp, epochs, self.sites[site])
        lanes = np.arange(self.width) if lanes is None else lanes
        if self.pool.options.copies_land_early:
            self._land(places, data)
        self.loose_copies.append((lanes, places, data))

    def _mark_copies(self, addresses, size, site):
        for region, some in self.pool.memory.split(addresses, size, self.sites[site], ""):
            self._mark(
                region, addresses if some is None else addresses[some], 4, size // 4, None, False, self.sites[site]
            )

    def _land(self, places, data):
        size = data.shape[1]
        width = min(size, 8)
        view = self.pool.shared.view(width, size // width)
        words = data.view(f"u{width}")
        view[places >> (size.bit_length() - 1)] = words if size > width else words[:, 0]

    def copy_commit(self, mask):
        if mask is None:
            self.copy_groups.append([self.all, self.all, self.loose_copies])
            self.loose_copies = []
            return
        inside, outside = [], []
        for lanes, places, data in self.loose_copies:
            chosen = mask[lanes]
            if chosen.any():
                inside.append((lanes[chosen], places[chosen], data[chosen]))
            if not chosen.all():
                outside.append((lanes[~chosen], places[~chosen], data[~chosen]))
        self.copy_groups.append([mask, mask, inside])
        self.loose_copies = outside

    def copy_wait(self, n_left, mask):
        """Let all groups of a lane arrive except its n_left latest."""
        newer = np.zeros(self.width, int)
        for group in reversed(self.copy_groups):
            committed, pending, copies = group
            ready = pending & (newer >= n_left)
            if mask is not None:
                ready = ready & mask
            if ready.any():
                group[1] = pending & ~ready
                for lanes, places, data in copies:
                    chosen = ready[lanes]
                    if not chosen.all():
                        lanes, places, data = lanes[chosen], places[chosen], data[chosen]
                    if lanes.size:
                        if not self.pool.options.copies_land_early:
                            self._land(places, data)
                        self.pool.shared.end_copy(places, data.shape[1], self.warp[lanes], self.epochs[lanes])
            newer = newer + committed
        while self.copy_groups and not self.copy_groups[0][1].any():
            self.copy_groups.pop(0)

    # --- matrices ---------------------------------------------------------------------------------------------------

    def load_matrix(self, address, number, transposed, mask, site):
        """ldmatrix: rows of 16 bytes at the addresses of the first 8 * number lanes of each warp."""
        self.converged(mask, site)
        giving = self.lane < 8 * number
        if mask is not None:
            giving = giving & mask
        places, lanes = self._places(address, giving, 16, site)
        rows = np.zeros((self.width, 8), u2)
        rows[lanes] = self.pool.shared.view(8, 2)[places >> 4].view(u2)
        self._read(places, lanes, 16, site)
        matrices = rows.reshape(self.n_warps, 4, 8, 8)[:, :number]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(u4).reshape(self.n_warps, number, 32)
        return [np.ascontiguousarray(words[:, i]).ravel() for i in range(number)]

    def store_matrix(self, address, words, transposed, mask, site):
        self.converged(mask, site)
        number = len(words)
        matrices = np.stack([w.reshape(self.n_warps, 32) for w in words], 1)
        matrices = np.ascontiguousarray(matrices).view(u2).reshape(self.n_warps, number, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = np.zeros((self.n_warps, 4, 8, 8), u2)
        rows[:, :number] = matrices
        rows = rows.reshape(self.width, 8)
        giving = self.lane < 8 * number
        if mask is not None:
            giving = giving & mask
        places, lanes = self._places(address, giving, 16, site)
        self.pool.shared.view(8, 2)[places >> 4] = np.ascontiguousarray(rows[lanes]).view(u8)
        self._wrote(places, lanes, 16, site)

    def multiply(self, shape, dtype, result_dtype, a, b, c, mask, site):
        self.converged(mask, site)
        m, n, k = matrix.sizes(shape)
        n_warps = self.n_warps if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        self.pool.report.counts["mma FLOPs"] += 2 * m * n * k * n_warps
        return matrix.multiply((m, n, k), dtype, result_dtype, a, b, c)
