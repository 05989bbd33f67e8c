"""Teams: lanes that share registers as arrays, and how they diverge and reconverge."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .accesses import KINDS
from .ampere import Ampere
from .hopper import Hopper
from .memory import Fault
from .shuffles import Shuffles
from .stamps import stamps

u4 = np.uint32
# Where parameters that are descriptors seem to lie.
PARAMETER_BASE = 0x70000000


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


class Team(Shuffles, Ampere, Hopper):
    """Lanes that share registers as arrays. Methods without an underscore are what translated blocks call."""

    def __init__(self, pool: Any, lanes: np.ndarray):
        """lanes: of the pool; whole warps."""
        self.pool, self.width = pool, lanes.size
        self.program = lanes // pool.n_threads  # within the pool
        self.programs = np.unique(self.program)
        self.thread = (lanes % pool.n_threads).astype(u4)
        self.warp = (lanes // 32).astype(np.int32)
        self.n_warps = self.width // 32
        self.programs_of_warps = self.program[::32]
        self.lane = np.arange(self.width) % 32
        self.base = self.program.astype(np.int64) * pool.shared.n_bytes
        self.warp_of_program = self.thread.astype(np.int64) // 32
        self.syncs = np.zeros(self.width, np.int64)
        self.stamp()
        self.all = np.ones(self.width, bool)
        self.true, self.false = self.all, np.zeros(self.width, bool)
        zeros = {k: np.zeros(self.width, d) for k, d in KINDS.items()} | {"p": self.false}
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
        self.waits_in_vain = False  # for an mbarrier, so that others should run

    def stamp(self) -> None:
        """Called after every barrier."""
        self.stamps = stamps(
            self.pool.numbers[self.program], self.pool.epoch[self.program], self.warp_of_program, self.syncs, self.lane
        )

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
            if pool.steps > pool.options.max_steps or self.waits_in_vain:
                self.waits_in_vain = False
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
            one = np.array([bits], f"u{kind[1]}").view(KINDS[kind])[0]
            self.caches[key] = np.full(self.width, one)
        return self.caches[key]

    def parameter(self, name, offset, kind):
        key = name, offset, kind
        if key not in self.caches:
            dtype = KINDS[kind]
            one = np.frombuffer(self.pool.parameters[name], dtype, 1, offset)[0]
            self.caches[key] = np.full(self.width, one)
        return self.caches[key]

    def address_of(self, name, kind, width):
        """0 for shared memory; for a parameter that is a descriptor, a number that stands for it."""
        symbols = self.pool.program.entry.symbols
        if name in symbols and symbols[name][0] == "shared":
            return self.constant(f"u{width}", 0).view(KINDS[kind])
        if name in self.pool.program.entry.parameters:
            place = PARAMETER_BASE + self.pool.program.entry.parameters[name][2]
            return self.constant(f"u{width}", place).view(KINDS[kind])
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

    def warp_sync(self, mask, site):
        """bar.warp.sync: orders what the lanes of a warp did before and do after."""
        self.converged(mask, site)
        self.syncs += 1 if mask is None else mask
        self.stamp()

    def trap(self, mask, site):
        if mask is None or mask.any():
            self.pool.report.note("trap", self.sites[site], "")
            raise Fault(f"trap: {self.sites[site]}")
