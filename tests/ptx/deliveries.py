"""Which warps have waited for the bytes that tensor copies brought to shared memory.

A delivery is what has arrived at an mbarrier between two of its tests. It may be touched by the warps that have seen
the phase of the mbarrier complete, and by all warps of their program after the next `bar.sync`.
"""

from collections.abc import Iterable

import numpy as np

from .stamps import several_warps, warp_of

_ALL = ~np.uint64(0)


class Deliveries:
    """The deliveries to the shared memory of a pool of programs, numbered from 1."""

    def __init__(self, n_units: int):
        # The last one; 0 without any. What is stored over it is known to others by a barrier, and so is the delivery.
        self._of_unit = np.zeros(n_units, np.int32)
        self._waited = np.full(16, _ALL)  # by delivery, a bit for each warp of its program
        self._last = 0
        self._awaited: dict[int, list[int]] = {}  # by program, what not all of its warps have waited for

    def arrive(self, program: int, units: np.ndarray) -> int:
        """Note a delivery, and return its number."""
        self._last += 1
        if self._last == len(self._waited):
            self._waited = np.concatenate((self._waited, np.full_like(self._waited, _ALL)))
        self._waited[self._last] = 0
        self._of_unit[units] = self._last
        self._awaited.setdefault(program, []).append(self._last)
        return self._last

    def wait(self, numbers: list[int], warps: np.ndarray) -> None:
        """Note that warps of the program have waited for some deliveries."""
        bits = np.bitwise_or.reduce(np.uint64(1) << np.unique(warps).astype(np.uint64))
        self._waited[numbers] |= bits

    def barrier(self, programs: Iterable[int]) -> None:
        """All warps of some programs know what one of them has waited for."""
        for program in programs:
            numbers = np.array(self._awaited.get(program, ()), np.int64)
            known = self._waited[numbers] != 0
            self._waited[numbers[known]] = _ALL
            self._awaited[program] = numbers[~known].tolist()

    def not_waited_for(self, units: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Which units hold bytes of a delivery for which the warp of a stamp has not waited."""
        numbers = self._of_unit[units]
        if not numbers.any():
            return numbers.astype(bool)
        is_waited_for = self._waited[numbers] >> warp_of(stamps).astype(np.uint64) & np.uint64(1)
        return (is_waited_for == 0) & ~several_warps(stamps)
