"""Loads, stores and atomics of a team, and what is recorded of them: races, sectors and bank conflicts."""

import operator
from typing import Any

import numpy as np

from .grid_order import reaches_programs
from .memory import Fault

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
KINDS = {k: np.dtype(k.replace("s", "i") if k[0] == "s" else k) for k in
          ("u1", "u2", "u4", "u8", "s1", "s2", "s4", "s8", "f2", "f4", "f8")}  # fmt: skip
_ATOMICS = {
    "add": operator.add, "min": min, "max": max,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip


class Accesses:
    """Part of a team, whose fields it uses. Addresses have one element per lane; None as a mask means all lanes."""

    pool: Any
    sites: Any
    width: Any
    program: Any
    warp: Any
    lane: Any
    base: Any
    stamps: Any
    _in_flight: Any

    # --- global memory ----------------------------------------------------------------------------------------------

    def load_global(self, address, mask, size, count, site):
        """ld.global: `count` words of `size` bytes from each lane's address, one array per word. site: who asks."""
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
        """st.global: `values`, one array per word, to each lane's address."""
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
            given = [word if lanes is None else word[lanes] for word in values]
            if count == 1:
                view[rows] = given[0]
            else:
                for i, word in enumerate(given):
                    view[rows, i] = word
            if self.pool.options.global_races:
                self._check_equal(view, rows, given, f"offset {{}} of {region.name}", offsets - u8(region.start), site)
                self._mark(region, offsets, size, count, lanes, True, instruction, unchanged)
        if self.pool.options.traffic:
            self._count_sectors(chosen, places, size * count, "store")

    @staticmethod
    def _lanes(places, some):
        if places is None:
            return some
        return places if some is None else places[some]

    def _mark(self, region, addresses, size, count, lanes, writes, instruction, unchanged=None):
        """Record who read or wrote which bytes, so that accesses that nothing orders are found."""
        order, stamps = self.pool.order, self._stamps(lanes)
        if order is None:
            self.pool.memory.mark(region, addresses, size * count, stamps, writes, instruction)
            return
        parts = instruction.parts
        if reaches_programs(parts):
            for stamp, address in zip(stamps.tolist(), addresses.tolist(), strict=True):
                order.strong(stamp, address, parts, not writes, writes)
        else:
            order.mark(region, addresses, size * count, stamps, writes, unchanged, instruction)

    def fence(self, mask):
        """fence and membar at a scope that reaches other programs."""
        if self.pool.order is not None:
            for stamp in self._stamps(mask).tolist():
                self.pool.order.fence(stamp)

    def _count_sectors(self, chosen, places, n_bytes, what):
        """Count the sectors of 32 bytes that each warp's access touches, and the bytes it asked for."""
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
        if kind not in KINDS:
            raise Fault(f"instruction not known: {instruction}")
        dtype = KINDS[f"u{kind[1]}"]
        result = np.zeros(self.width, dtype)
        size = dtype.itemsize
        # Without a word an atomic has the scope of the GPU.
        order = self.pool.order if space == "global" and "cta" not in instruction.parts else None
        for lane in places:
            if order is not None:
                order.strong(int(self.stamps[lane]), int(address[lane]), instruction.parts, True, True)
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
            before, value = old.view(KINDS[kind]), given[-1].view(KINDS[kind])
            if operation == "cas":
                new = given[1] if old == given[0] else old
            elif operation == "exch":
                new = given[0]
            else:
                new = _ATOMICS[operation](before, value)
                new = np.array(new, KINDS[kind]).view(dtype)[()]
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
        """ld.shared, as `load_global`."""
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
        """st.shared, as `store_global`."""
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
            self._check_equal(view, rows, given, "byte {}", places % self.pool.shared.n_bytes, site)

    def _check_equal(self, view, rows, given, where, places, site):
        """Check that lanes storing to one place at once store one value. given: an array for each word of a row. where:
        how a place is named."""
        stored = view[rows] if len(given) > 1 else view[rows][:, None]
        for i, word in enumerate(given):
            unequal = stored[:, i] != word
            if unequal.any():
                one = int(np.flatnonzero(unequal)[0])
                others = np.flatnonzero(rows == rows[one])
                self.pool.report.note(
                    "unequal values stored to one place at once",
                    self.sites[site],
                    f"{where.format(int(places[one]))}, bits {sorted({hex(int(v)) for v in word[others]})[:4]}",
                    int(unequal.sum()),
                )

    def _stamps(self, lanes):
        return self.stamps if lanes is None else self.stamps[lanes]

    def _read(self, places, lanes, n_bytes, site, together: Any = 0):
        """together: `LANES` where each place is read for several lanes."""
        options = self.pool.options
        if options.races:
            self.pool.shared.read(places, n_bytes, self._stamps(lanes) | together, self.sites[site])
        if options.traffic:
            self._count_banks(places, lanes, n_bytes, "load")

    def _wrote(self, places, lanes, n_bytes, site, unchanged=None, together: Any = 0):
        self._in_flight(places, n_bytes, site)
        options = self.pool.options
        if options.races:
            stamps = self._stamps(lanes) | together
            self.pool.shared.write(places, n_bytes, stamps, self.sites[site], unchanged)
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
