"""Memory of a launch: tensors as global memory, the shared memory of programs, and a record of every access."""

# pyright: reportOptionalSubscript=false
# Records of accesses exist once an access was marked.

import bisect
import ctypes
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .deliveries import Deliveries
from .stamps import NEVER, Accessed, between, named

_STORED_TWICE = "shared stores of what another warp stores too"
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """A fault that would stop a chip: a deadlock, or an instruction that cannot execute."""


@dataclass
class Report:
    """Problems and counts from running kernels. problems: (kind, instruction) -> [times, an example]."""

    problems: dict = field(default_factory=dict)
    opcodes: Counter = field(default_factory=Counter)  # executed, one for each warp
    blocks: Counter = field(default_factory=Counter)  # likewise
    counts: Counter = field(default_factory=Counter)

    def note(self, kind: str, instruction: object, example: str, times: int = 1) -> None:
        known = self.problems.setdefault((kind, str(instruction)), [0, example])
        known[0] += times

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.problems}


@dataclass
class Region:
    """Bytes of one tensor, or of the memory behind several."""

    start: int
    end: int
    name: str
    views: dict = field(default_factory=dict)
    accessed: Accessed | None = None
    reads: list = field(default_factory=list)  # what `mark` was told before the first write

    def view(self, size: int, count: int) -> np.ndarray:
        """The memory as elements of some bytes, in rows of `count`, from a multiple of 16 bytes before the region."""
        key = size, count
        if key not in self.views:
            first = self.start & ~15
            n_bytes = -(-(self.end - first) // 16) * 16
            raw = np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(first), np.uint8)  # type: ignore[call-overload]
            view = raw.view(_UNSIGNED[size])
            self.views[key] = view.reshape(-1, count) if count > 1 else view
        return self.views[key]


class GlobalMemory:
    """What a launch may touch.

    tensors: (name, first byte, byte behind the last) of what was passed. storages: the same of all memory behind it;
    what lies there but in no tensor is reported, and read nevertheless.
    """

    def __init__(self, tensors: list, storages: list, report: Report, grain: int = 1):
        """grain: bytes of the smallest access."""
        self.report, self.grain = report, grain
        self.tensors = self._joined(tensors)
        self.storages = self._joined(storages)
        self.last = self.storages[0] if self.storages else None
        self.starts = [r.start for r in self.storages]
        self.tensor_starts = np.array([r.start for r in self.tensors], np.int64)
        self.tensor_ends = np.array([r.end for r in self.tensors], np.int64)

    @staticmethod
    def _joined(spans: list) -> list[Region]:
        """The regions in order. Regions that touch become one."""
        regions: list[Region] = []
        for name, start, end in sorted(spans, key=lambda s: s[1:]):
            if regions and start <= regions[-1].end:
                regions[-1].end = max(regions[-1].end, end)
                if name not in regions[-1].name.split(","):
                    regions[-1].name += "," + name
            else:
                regions.append(Region(start, end, name))
        return regions

    def region(self, first: int, last: int) -> Region | None:
        """The region that holds all bytes from first up to last."""
        known = self.last
        if known is not None and known.start <= first and last <= known.end:
            return known
        place = bisect.bisect_right(self.starts, first) - 1
        if place >= 0 and last <= self.storages[place].end:
            self.last = self.storages[place]
            return self.last
        return None

    def split(self, addresses: np.ndarray, n_bytes: int, instruction: object, what: str) -> list:
        """(region, positions of the addresses in it). An address outside of all regions is reported and left out."""
        if addresses.size == 0:
            return []
        if int(addresses.max()) > 2**62:
            good = addresses < 2**62
            self.report.note(f"{what} outside of memory", instruction, hex(int(addresses.max())), int((~good).sum()))
            return self._split_some(addresses, np.flatnonzero(good), n_bytes, instruction, what)
        misaligned = addresses & np.uint64(n_bytes - 1)
        if misaligned.any():
            self.report.note(f"{what} misaligned", instruction, hex(int(addresses[misaligned != 0][0])),
                             int((misaligned != 0).sum()))  # fmt: skip
            good = np.flatnonzero(misaligned == 0)
            return self._split_some(addresses, good, n_bytes, instruction, what)
        return self._split_some(addresses, None, n_bytes, instruction, what)

    def _split_some(self, addresses, places, n_bytes, instruction, what) -> list:
        chosen = addresses if places is None else addresses[places]
        if chosen.size == 0:
            return []
        region = self.region(int(chosen.min()), int(chosen.max()) + n_bytes)
        if region is not None:
            found = [(region, places)]
        else:
            found, places = [], np.arange(addresses.size) if places is None else places
            signed = addresses.astype(np.int64)
            left = np.ones(places.size, bool)
            for region in self.storages:
                inside = left & (signed[places] >= region.start) & (signed[places] + n_bytes <= region.end)
                if inside.any():
                    found.append((region, places[inside]))
                    left &= ~inside
            if left.any():
                bad = int(signed[places[left]][0])
                self.report.note(f"{what} outside of memory", instruction, self._nearest(bad), int(left.sum()))
        if what and self.tensor_starts.size:
            signed = chosen.astype(np.int64)
            place = np.searchsorted(self.tensor_starts, signed, "right") - 1
            outside = (place < 0) | (signed + n_bytes > self.tensor_ends[np.maximum(place, 0)])
            if outside.any() and region is not None:
                self.report.note(f"{what} beside the tensors passed", instruction,
                                 self._nearest(int(signed[outside][0])), int(outside.sum()))  # fmt: skip
        return found

    def _nearest(self, address: int) -> str:
        nearest = min(self.tensors, key=lambda r: max(r.start - address, address - r.end + 1, 0))
        if address >= nearest.end:
            return f"{address - nearest.end} bytes behind the end of {nearest.name}"
        return f"{nearest.start - address} bytes before the start of {nearest.name}"

    # --- threads that touch the same elements ------------------------------------------------------------------------

    def mark(
        self, region: Region, addresses: np.ndarray, n_bytes: int, stamps: np.ndarray, writes: bool, instruction: object
    ) -> None:
        """Note accesses of n_bytes. Most tensors are only read, so that reads wait until something is written."""
        if region.accessed is None:
            if not writes:
                region.reads.append((region, addresses, n_bytes, stamps, writes, instruction))
                return
            region.accessed = Accessed(self.n_units(region))
            for read in region.reads:
                self.mark(*read)
            region.reads.clear()
        units, stamps = self.units(region, addresses, n_bytes), stamps[:, None]
        if writes:
            wrote, early, had_read, early_read = region.accessed.write(units, stamps)
            pairs = [("write after write", wrote, early), ("write after read", had_read, early_read)]
            if (at_once := region.accessed.wrote_at_once(units, stamps)).any():
                pairs.append(("two writes", region.accessed.writes[units], at_once))
        else:
            pairs = [("read after write", *region.accessed.read(units, stamps))]
        for kind, others, early in pairs:
            if early.any():
                self._race(kind, region, addresses, early, stamps, others, instruction)

    def n_units(self, region: Region) -> int:
        return (region.end - (region.start & ~15)) // self.grain + 1

    def units(self, region: Region, addresses: np.ndarray, n_bytes: int) -> np.ndarray:
        """(accesses, units of each) of a region."""
        first = ((addresses - np.uint64(region.start & ~15)) // np.uint64(self.grain)).astype(np.int64)[:, None]
        return first + np.arange(n_bytes // self.grain) if n_bytes > self.grain else first

    def _race(self, kind, region, addresses, early, stamps, others, instruction) -> None:
        one, column = (int(n[0]) for n in np.nonzero(early))
        mine, other = int(stamps[one, 0]), int(others[one, column])
        self.report.note(f"global race between {between(mine, other)}: {kind}", instruction,
                         f"offset {int(addresses[one]) - region.start} of {region.name}: {named(mine)}; {named(other)}",
                         int(early.any(1).sum()))  # fmt: skip


class SharedMemory:
    """Shared memory of some programs, side by side.

    Of each unit (the smallest access of the kernel) it is known who touched it last, and whether an asynchronous copy
    into it is in flight.
    """

    def __init__(self, n_programs: int, n_bytes: int, grain: int, report: Report, races: bool):
        self.n_bytes = -(-max(n_bytes, 16) // 1024) * 1024
        self.declared = n_bytes
        self.report, self.races = report, races
        self.bytes = np.full(n_programs * self.n_bytes, 0xFF, np.uint8)
        self.views: dict = {}
        self.shift = max(grain, 1).bit_length() - 1
        if races:
            self.accessed = Accessed(self.bytes.size >> self.shift)
            self.pending = np.zeros(self.bytes.size >> self.shift, np.int16)
            self.n_pending = 0
        self.deliveries: Deliveries | None = None  # stays None without races

    def view(self, size: int, count: int) -> np.ndarray:
        key = size, count
        if key not in self.views:
            view = self.bytes.view(_UNSIGNED[size])
            self.views[key] = view.reshape(-1, count) if count > 1 else view
        return self.views[key]

    def units(self, places: np.ndarray, n_bytes: int) -> np.ndarray:
        """(accesses, units of each); places: in bytes of the whole."""
        first = (places >> self.shift)[:, None]
        n = n_bytes >> self.shift
        return first + np.arange(n) if n > 1 else first

    def read(self, places, n_bytes, stamps, instruction) -> None:
        """stamps: of the threads that read, one for each place."""
        if not self.races:
            return
        units, stamps = self.units(places, n_bytes), stamps[:, None]
        self._check_pending("read of a copy in flight", places, units, instruction)
        self._check_waited("read", places, units, stamps, instruction)
        wrote, early = self.accessed.read(units, stamps)
        if (unwritten := wrote == NEVER).any():
            bad = int(places[np.flatnonzero(unwritten.any(1))[0]])
            self.report.note("uninitialised shared memory read", instruction, f"byte {bad % self.n_bytes}",
                             int(unwritten.any(1).sum()))  # fmt: skip
        if early.any():
            self._race("read after write", early, places, stamps, wrote, instruction)

    def write(self, places, n_bytes, stamps, instruction, unchanged=None) -> None:
        """unchanged: accesses that store the value that is already there."""
        if not self.races:
            return
        units, stamps = self.units(places, n_bytes), stamps[:, None]
        self._check_pending("write where a copy is in flight", places, units, instruction)
        self._check_waited("overwritten", places, units, stamps, instruction)
        wrote, early, had_read, early_read = self.accessed.write(units, stamps)
        if unchanged is not None and early.any():
            # As triton does where warps hold copies of a value: harmless, but work done twice.
            self.report.counts[_STORED_TWICE] += int(early[unchanged].any(1).sum())
            early &= ~unchanged[:, None]
        if early.any():
            self._race("write after write", early, places, stamps, wrote, instruction)
        if early_read.any():
            self._race("write after read", early_read, places, stamps, had_read, instruction)
        if (at_once := self.accessed.wrote_at_once(units, stamps)).any():
            # Unequal values are noted by who stores them.
            self.report.counts[_STORED_TWICE] += int(at_once.any(1).sum())

    def begin_copy(self, places, n_bytes, stamps, instruction) -> None:
        if self.races:
            units = self.units(places, n_bytes)
            self.write(places, n_bytes, stamps, instruction)
            self.pending[units] += 1
            self.n_pending += units.size

    def end_copy(self, places, n_bytes, stamps) -> None:
        """The bytes are visible to the thread that waited, and to the others after the next barrier."""
        if self.races:
            units = self.units(places, n_bytes)
            self.pending[units] -= 1
            self.n_pending -= units.size
            self.accessed.writes[units] = stamps[:, None]

    def deliver(self, program, places, n_bytes) -> int:
        """Note that a tensor copy has arrived, for the warps that wait for it. Returns the number of the delivery."""
        if not self.races:
            return 0
        units = self.units(places, n_bytes)
        self.pending[units] -= 1
        self.n_pending -= units.size
        self.accessed.settle(units)
        if self.deliveries is None:
            self.deliveries = Deliveries(self.pending.size)
        return self.deliveries.arrive(program, units)

    def wait(self, numbers, warps) -> None:
        """Note that warps of a program have waited for deliveries."""
        if self.deliveries is not None and numbers:
            self.deliveries.wait(numbers, warps)

    def check_waited(self, places, n_bytes, stamps, instruction) -> None:
        """Check that the thread of each stamp has waited for what lies at all places."""
        if self.races:
            for stamp in stamps:
                self._check_waited("read", places, self.units(places, n_bytes), stamp[None, None], instruction)

    def _check_waited(self, done, places, units, stamps, instruction) -> None:
        if self.deliveries is None:
            return
        early = self.deliveries.not_waited_for(units, stamps)
        if early.any():
            bad = int(places[np.flatnonzero(early.any(1))[0]])
            self.report.note(f"tensor copy {done} by a warp that has not waited for it", instruction,
                             f"byte {bad % self.n_bytes}", int(early.any(1).sum()))  # fmt: skip

    def _check_pending(self, kind, places, units, instruction) -> None:
        if self.n_pending and (flying := self.pending[units]).any():
            bad = int(places[np.flatnonzero(flying.any(1))[0]])
            self.report.note(kind, instruction, f"byte {bad % self.n_bytes}", int(flying.any(1).sum()))

    def _race(self, kind, early, places, stamps, others, instruction) -> None:
        one, column = (int(n[0]) for n in np.nonzero(early))
        mine, other = int(stamps[one, 0]), int(others[one, column])
        self.report.note(f"shared race between {between(mine, other)}: {kind}", instruction,
                         f"byte {int(places[one]) % self.n_bytes}: {named(mine)}; {named(other)}",
                         int(early.any(1).sum()))  # fmt: skip
