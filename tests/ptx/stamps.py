"""Who touched a place last, and whether PTX orders two accesses.

An access has a stamp: its program, the number of barriers that the program has passed (the epoch), its warp, the number
of `bar.warp.sync` that the warp has executed, and its lane. Two accesses of a place, one of which writes, are ordered
if one thread makes both, if a barrier of their program lies between them, or in one warp a `bar.warp.sync`. Shuffles,
votes and products of matrices need all lanes and yet order no memory.
"""

from typing import Any

import numpy as np

# From the lowest bit: lane, synchronisations of the warp, warp, epoch, program, and a bit that every stamp has. Memory
# that is full of zeros was not touched, and costs nothing before it is.
_SYNC, _WARP, _EPOCH, _PROGRAM, _TOUCHED = (np.int64(n) for n in (6, 18, 24, 44, 62))
LANES, WRITING_LANES = np.int64(63), np.int64(62)  # several lanes of a warp, which read or write together
WARPS = np.int64(63) << _WARP | LANES  # several warps
_PROGRAMS = np.int64(0x3FFFF) << _PROGRAM | WARPS
OF_A_WARP = ~((np.int64(1) << _WARP) - 1) & ~(np.int64(0xFFFFF) << _EPOCH)  # the bits that tell warps apart
_THREAD = OF_A_WARP | LANES
NEVER, _SETTLED = np.int64(0), np.int64(1)  # not touched yet; ordered before all that follows


def stamps(programs: np.ndarray, epochs: np.ndarray, warps: np.ndarray, syncs: np.ndarray, lanes: np.ndarray):
    """The stamps of threads. epochs and syncs count modulo 2^20 and 2^12."""
    return (
        1 << _TOUCHED
        | programs << _PROGRAM
        | (epochs & 0xFFFFF) << _EPOCH
        | warps << _WARP
        | (syncs & 0xFFF) << _SYNC
        | lanes
    )


def _apart(known: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs of stamps are of two threads that nothing orders, and the bits in which the pairs differ."""
    difference = known ^ mine
    # In one epoch of a program: 1 to 2^24. What nobody touched has no highest bit, so that the difference has it.
    near = difference.view(np.uint64) - np.uint64(1) < np.uint64((1 << _EPOCH) - 1)
    if near.any():
        near &= (difference < 1 << _SYNC) | (difference >= 1 << _WARP)
    return near | _in_programs(difference), difference


def _in_programs(difference: np.ndarray) -> np.ndarray:
    return (difference >= 1 << _PROGRAM) & (difference < 1 << _TOUCHED)


def _joined(mine: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """A stamp for both of two threads, which differs from that of every thread."""
    several = np.where(difference >= 1 << _WARP, WARPS, LANES)
    return mine | np.where(difference >= 1 << _PROGRAM, _PROGRAMS, several)


def program_of(stamp: Any) -> Any:
    return stamp >> _PROGRAM & 0x3FFFF


def epoch_of(stamp: Any) -> Any:
    return stamp >> _EPOCH & 0xFFFFF


def warp_of(stamp: Any) -> Any:
    return stamp >> _WARP & 63


def several_warps(stamp: Any) -> Any:
    """Whether a stamp is of several warps, and so of none in particular."""
    return (stamp & WARPS) >= (WARPS & ~LANES)


def thread_of(stamp: Any) -> Any:
    """The bits that tell threads apart."""
    return stamp & _THREAD


def between(one: int, other: int) -> str:
    """What two stamps are of."""
    difference = one ^ other
    if difference >= 1 << _PROGRAM:
        return "programs"
    return "warps" if difference >= 1 << _WARP else "lanes of a warp"


def named(stamp: int) -> str:
    """A stamp in words, for messages."""
    fields = ("program", stamp >> 44 & 0x3FFFF, 0x3FFFF), ("warp", stamp >> 18 & 63, 63), ("lane", stamp & 63, 62)
    return ", ".join(
        f"several {what}s" if number >= several else f"{what} {number}" for what, number, several in fields
    )


class Accessed:
    """The stamps of the last write and of the last reads of some units of memory."""

    def __init__(self, n_units: int):
        self.writes = np.zeros(n_units, np.int64)
        self.reads = np.zeros(n_units, np.int64)

    def settle(self, units: np.ndarray) -> None:
        """What lies there is ordered before all that follows."""
        self.writes[units] = _SETTLED

    def read(self, units: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Note reads. Returns the stamps of the last writes, and which of them nothing orders before."""
        wrote = self.writes[units]
        early, _ = _apart(wrote, mine)
        apart, difference = _apart(self.reads[units], mine)
        new = np.where(apart, _joined(mine, difference), mine) if apart.any() else mine
        self.reads[units] = new
        at_once = self.reads[units] ^ new
        for several, least in ((LANES, 1), (WARPS, 1 << _WARP), (_PROGRAMS, 1 << _PROGRAM)):
            more = at_once >= least
            if not more.any():
                break
            self.reads[units[more]] |= several
        return wrote, early

    def write(self, units: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Note writes. Returns the stamps of the last writes, which of them nothing orders, and the same of reads."""
        wrote, had_read = self.writes[units], self.reads[units]
        self.writes[units] = mine
        return wrote, _apart(wrote, mine)[0], had_read, _apart(had_read, mine)[0]

    def wrote_at_once(self, units: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Where, right after `write`, another warp's write of the same instruction is what was noted."""
        return (self.writes[units] ^ mine) >= 1 << _WARP
