"""The features of sm_80: asynchronous copies, and matrices that the lanes of a warp hold together."""

from typing import Any

import numpy as np

from . import matrix
from .accesses import Accesses
from .stamps import LANES, WRITING_LANES

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64


class Ampere(Accesses):
    """Part of a team: cp.async, ldmatrix, stmatrix and mma.sync."""

    all: Any
    n_warps: Any
    converged: Any
    loose_copies: Any
    copy_groups: Any

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
                    if self.pool.options.global_races:
                        addresses, givers = source[chosen] + u8(start), self._lanes(lanes, chosen)
                        self._mark(region, addresses, step, 1, givers, False, self.sites[site])
        if self.pool.options.traffic:
            some = np.flatnonzero(wanted)
            self._count_sectors(source[some], some if lanes is None else lanes[some], size, "load")
            self._count_banks(places, lanes, size, "store")
        self._in_flight(places, size, site)
        self.pool.shared.begin_copy(places, size, self._stamps(lanes), self.sites[site])
        lanes = np.arange(self.width) if lanes is None else lanes
        if self.pool.options.copies_land_early:
            self._land(places, data)
        self.loose_copies.append((lanes, places, data))

    def _land(self, places, data):
        """Write copied bytes into shared memory."""
        size = data.shape[1]
        width = min(size, 8)
        view = self.pool.shared.view(width, size // width)
        words = data.view(f"u{width}")
        view[places >> (size.bit_length() - 1)] = words if size > width else words[:, 0]

    def copy_commit(self, mask):
        """cp.async.commit_group: the copies that the lanes have begun since the last one become a group."""
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
                        self.pool.shared.end_copy(places, data.shape[1], self.stamps[lanes])
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
        self._read(places, lanes, 16, site, LANES)
        matrices = rows.reshape(self.n_warps, 4, 8, 8)[:, :number]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(u4).reshape(self.n_warps, number, 32)
        return [np.ascontiguousarray(words[:, i]).ravel() for i in range(number)]

    def store_matrix(self, address, words, transposed, mask, site):
        """stmatrix: the inverse of `load_matrix`."""
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
        view, given = self.pool.shared.view(8, 2), np.ascontiguousarray(rows[lanes]).view(u8)
        unchanged = (view[places >> 4] == given).all(1) if self.pool.options.races else None
        view[places >> 4] = given
        self._wrote(places, lanes, 16, site, unchanged, WRITING_LANES)
        if self.pool.options.races:
            self._check_equal(view, places >> 4, given.T, "byte {}", places % self.pool.shared.n_bytes, site)

    def multiply(self, shape, dtype, result_dtype, a, b, c, mask, site):
        """mma.sync: one product of small matrices for each warp."""
        self.converged(mask, site)
        m, n, k = matrix.sizes(shape)
        n_warps = self.n_warps if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        self.pool.report.counts[f"{dtype} FLOPs"] += 2 * m * n * k * n_warps
        return matrix.multiply((m, n, k), dtype, result_dtype, a, b, c)
