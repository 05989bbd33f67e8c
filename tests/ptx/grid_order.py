"""Programs of a cooperative launch, which wait for each other: what each knows of what the others have done.

The time of an access is its epoch, the number of barriers that its program had passed. A release leaves at an address
what it covers: of its own program the epochs before the present one, because only a barrier joins the threads of a
program, and what its thread knows of other programs. An acquire at that address takes this over, at once for its own
thread and at the next barrier for its program. A fence makes releases of the strong writes of its thread that follow,
and acquires of the strong reads before it. All of these work only at a scope that holds both programs: `.gpu`, `.sys`.
"""

from collections import defaultdict

import numpy as np

from .memory import GlobalMemory, Region
from .stamps import epoch_of, program_of, thread_of


def reaches_programs(parts: list[str]) -> bool:
    """Whether the scope of a strong access or of a fence holds other programs. volatile is relaxed at `.sys`."""
    return any(word in parts for word in ("gpu", "sys", "gl", "volatile"))


class GridOrder:
    """Two programs may touch an element, one of them writing, only where the later knows of the earlier access; writing
    what is there already is let through. What programs know is a vector: of each program the last epoch known.

    Threads of one program are not checked here: all warps of a persistent kernel load what one of them overwrites, and
    only that one's value is used.
    """

    def __init__(self, n_programs: int, memory: GlobalMemory):
        self.memory, self.n_programs = memory, n_programs
        self.known = [self._nothing() for _ in range(n_programs)]  # by all threads of a program
        self.fresh: list = [
            defaultdict(self._nothing) for _ in range(n_programs)
        ]  # by a thread, since the last barrier
        self.left: dict = defaultdict(self._nothing)  # at an address, by releases
        self.fenced: dict = {}  # by a thread's last fence
        self.loaded: dict = defaultdict(self._nothing)  # by a thread's strong reads since then
        self.regions: dict[int, tuple] = {}
        self.reads: dict = defaultdict(list)  # of a region before its first write

    def _nothing(self) -> np.ndarray:
        return np.full(self.n_programs, -1)

    def barrier(self, program: int) -> None:
        """Note that all threads of a program have met."""
        for vector in self.fresh[program].values():
            np.maximum(self.known[program], vector, out=self.known[program])
        self.fresh[program].clear()

    def _covered(self, stamp: int) -> np.ndarray:
        program, thread = program_of(stamp), thread_of(stamp)
        vector = self.known[program].copy()
        if thread in self.fresh[program]:
            np.maximum(vector, self.fresh[program][thread], out=vector)
        vector[program] = epoch_of(stamp) - 1
        return vector

    def fence(self, stamp: int) -> None:
        thread = thread_of(stamp)
        self.fenced[thread] = self._covered(stamp)
        if thread in self.loaded:
            vector = self.fresh[program_of(stamp)][thread]
            np.maximum(vector, self.loaded.pop(thread), out=vector)

    def strong(self, stamp: int, address: int, parts: list[str], reads: bool, writes: bool) -> None:
        """An access of a thread whose scope reaches other programs. parts: of the opcode."""
        thread = thread_of(stamp)
        if writes:
            releases = "release" in parts or "acq_rel" in parts
            vector = self._covered(stamp) if releases else self.fenced.get(thread)
            if vector is not None:
                np.maximum(self.left[address], vector, out=self.left[address])
        if reads and address in self.left:
            acquires = "acquire" in parts or "acq_rel" in parts
            vector = (self.fresh[program_of(stamp)] if acquires else self.loaded)[thread]
            np.maximum(vector, self.left[address], out=vector)

    def mark(
        self, region: Region, addresses: np.ndarray, n_bytes: int, stamps: np.ndarray, writes: bool, unchanged,
        instruction: object,
    ) -> None:  # fmt: skip
        """Note weak accesses of threads of one program."""
        program = program_of(int(stamps[0]))
        units = self.memory.units(region, addresses, n_bytes)
        if id(region) not in self.regions:
            if not writes:  # Most tensors are only read.
                self.reads[id(region)].append((program, units, epoch_of(stamps)[:, None]))
                return
            n_units = self.memory.n_units(region)
            self.regions[id(region)] = np.zeros(n_units, np.int64), np.full((self.n_programs, n_units), -1, np.int32)
            for reader, places, epochs in self.reads.pop(id(region), ()):
                self.regions[id(region)][1][reader, places] = epochs
        wrote, read = self.regions[id(region)]
        known = np.repeat(self.known[program][None], stamps.size, 0)
        for thread, vector in self.fresh[program].items():
            mine = thread_of(stamps) == thread
            known[mine] = np.maximum(known[mine], vector)

        who, stamps = program_of(wrote[units]), stamps[:, None]
        elsewhere = (wrote[units] != 0) & (who != program)
        unknown = elsewhere & (epoch_of(wrote[units]) > np.take_along_axis(known, np.where(elsewhere, who, 0), 1))
        if writes:
            for other in range(self.n_programs):
                if other != program:
                    unknown |= read[other, units] > known[:, other, None]
            if unchanged is not None:
                unknown &= ~unchanged[:, None]
        if unknown.any():
            one, column = (int(n[0]) for n in np.nonzero(unknown))
            self.memory.report.note(
                "global race between programs", instruction,
                f"program {program}, last written by {int(who[one, column])}, offset "
                f"{int(addresses[one]) - region.start} of {region.name}", int(unknown.any(1).sum()),
            )  # fmt: skip
        if writes:
            wrote[units] = stamps
        else:
            read[program, units] = epoch_of(stamps)
