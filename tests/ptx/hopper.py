"""The features of sm_90: tensor copies by descriptor, barriers in shared memory, matrix products of four warps.

Copies arrive as late as allowed: a load when its barrier is tested for the second time, a store when it is waited for.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import matrix
from .memory import Fault
from .stamps import OF_A_WARP, WARPS, epoch_of, program_of

u2, u4, u8 = np.uint16, np.uint32, np.uint64
# Bytes of a row in a swizzled tile, by the mode in a matrix descriptor and in a tensor descriptor.
_MATRIX_ROWS = {1: 128, 2: 64, 3: 32}
_TENSOR_ROWS = {1: 32, 2: 64, 3: 128}


def swizzled(places: np.ndarray, row_bytes: int) -> np.ndarray:
    """XOR bits 4 and up of an address with the bits from 7 on."""
    return places ^ ((places >> 7 & row_bytes // 16 - 1) << 4)


class Hopper:
    """Part of a team, whose fields it uses."""

    pool: Any
    sites: Any
    width: Any
    program: Any
    base: Any
    stamps: Any
    warp_of_program: Any
    loose_products: Any
    product_groups: Any
    loose_stores: Any
    store_groups: Any
    waits_in_vain: bool
    _places: Any
    _stamps: Any
    _count_sectors: Any

    def _in_flight(self, places, n_bytes, site):
        """Check that nothing is written where a product still reads that was not waited for."""
        flying = [p for group in (*self.product_groups, self.loose_products) for p, _, _ in group]
        if flying:
            chunks = np.unique((places[:, None] + np.arange(0, n_bytes, 16)) >> 4)
            if np.isin(chunks, np.concatenate(flying) >> 4).any():
                self.pool.report.note("operand of a wgmma in flight overwritten", self.sites[site], "")

    # --- barriers in shared memory ----------------------------------------------------------------------------------

    def _each(self, address, mask, site):
        """(lane, program, address) of each lane that acts."""
        lanes = range(self.width) if mask is None else np.flatnonzero(mask)
        return [(lane, int(self.program[lane]), int(address[lane])) for lane in lanes]

    def _mbarrier(self, program, address, site):
        found = self.pool.mbarriers.get((program, address))
        if found is None:
            self.pool.report.note("mbarrier used before its init", self.sites[site], f"byte {address}")
        return found

    def _touch(self, address, mask, writes, site):
        """Record the access: setting up or removing a barrier writes its memory, and using it reads it."""
        places, lanes = self._places(address, mask, 8, site)
        access = self.pool.shared.write if writes else self.pool.shared.read
        access(places, 8, self._stamps(lanes), self.sites[site])

    def mbarrier_init(self, address, count, mask, site):
        self._touch(address, mask, True, site)
        for _, program, place in self._each(address, mask, site):
            # arrived, complete: deliveries of the present phase, and of those before it.
            self.pool.mbarriers[program, place] = SimpleNamespace(
                count=count, left=count, bytes=0, phase=0, copies=[], was_asked=False, arrived=[], complete=[]
            )

    def mbarrier_inval(self, address, mask, site):
        self._touch(address, mask, True, site)
        for _, program, place in self._each(address, mask, site):
            known = self.pool.mbarriers.pop((program, place), None)
            if known is not None and known.copies:
                self.pool.report.note("mbarrier dropped while a copy is in flight", self.sites[site], f"byte {place}")

    def mbarrier_arrive(self, address, n_bytes, mask, site):
        self._touch(address, mask, False, site)
        for lane, program, place in self._each(address, mask, site):
            barrier = self._mbarrier(program, place, site)
            if barrier is None:
                continue
            if n_bytes is not None:
                barrier.bytes += int(n_bytes[lane])
            barrier.left -= 1
            self._turn(barrier)

    @staticmethod
    def _turn(barrier) -> None:
        if barrier.left == 0 and barrier.bytes == 0:
            barrier.left, barrier.phase = barrier.count, barrier.phase ^ 1
            barrier.complete, barrier.arrived = barrier.complete + barrier.arrived, []

    def mbarrier_test(self, address, parity, mask, site):
        """Whether the phase with this parity has completed."""
        self._touch(address, mask, False, site)
        result = np.zeros(self.width, bool)
        lanes = np.arange(self.width) if mask is None else np.flatnonzero(mask)
        keys = self.program[lanes].astype(np.int64) << 32 | address[lanes].astype(np.int64)
        for key in np.unique(keys):
            program, place = int(key) >> 32, int(key) & 0xFFFFFFFF
            same = lanes[keys == key]
            barrier = self._mbarrier(program, place, site)
            if barrier is None:
                result[same] = True
                continue
            if barrier.copies and not barrier.was_asked:  # As late as can be: whoever asks once has not waited.
                barrier.was_asked = True
                continue
            for places, data in barrier.copies:
                self.pool.shared.view(8, 2)[places >> 4] = data
                barrier.arrived.append(self.pool.shared.deliver(program, places, 16))
                barrier.bytes -= 16 * places.size
            barrier.copies, barrier.was_asked = [], False
            self._turn(barrier)
            result[same] = (barrier.phase != 0) != (parity[same] != 0)
            self.pool.shared.wait(barrier.complete, self.warp_of_program[same[result[same]]])
        self.waits_in_vain = not result[lanes].all()
        return result

    def fence_proxy(self, mask):
        unfenced = self.pool.unfenced
        if unfenced is None:
            return
        mine = self._stamps(mask)
        places = np.flatnonzero(unfenced)
        wrote = self.pool.shared.accessed.writes[places]
        # What the fence is ordered after: stores of the same warps, and those before the last barrier.
        of_same_warp = np.isin(wrote & OF_A_WARP, np.unique(mine & OF_A_WARP))
        of_same_program = np.isin(program_of(wrote), np.unique(program_of(mine)))
        in_this_epoch = np.isin(epoch_of(wrote), np.unique(epoch_of(mine)))
        unfenced[places[of_same_warp | of_same_program & ~in_this_epoch]] = False

    def _fenced(self, places, n_bytes, site):
        if self.pool.unfenced is not None:
            bad = self.pool.unfenced[self.pool.shared.units(places, n_bytes)].any(1)
            if bad.any():
                self.pool.report.note(
                    "no fence.proxy.async between a store and an asynchronous read",
                    self.sites[site],
                    f"byte {int(places[bad][0]) % self.pool.shared.n_bytes}",
                    int(bad.sum()),
                )

    # --- tensor copies ----------------------------------------------------------------------------------------------

    def _box(self, descriptor, coordinates, site):
        """(addresses of elements, which of them are in the tensor, their places in the tile in bytes); coordinates:
        innermost first."""
        about = self.pool.descriptors.get(int(descriptor))
        if about is None:
            raise Fault(f"no tensor descriptor at {int(descriptor):#x}: {self.sites[site]}")
        rank = len(about.box)
        index = np.indices(about.box).reshape(rank, -1)
        start = np.array([int(c) for c in coordinates])[::-1]
        index = index + start[:, None]
        inside = ((index >= 0) & (index < np.array(about.shape)[:, None])).all(0)
        address = about.address + (index * np.array(about.strides)[:, None]).sum(0) * about.element
        tile = np.arange(index.shape[1]) * about.element
        return about, address, inside, tile

    def _tile_places(self, about, base, to, tile):
        """Where the bytes of a tile lie in shared memory."""
        places = to + tile
        if about.swizzle:
            row = _TENSOR_ROWS[about.swizzle]
            if about.box[-1] * about.element > row:
                raise Fault(f"rows of {about.box[-1] * about.element} bytes exceed a swizzle of {row}")
            places = swizzled(places, row)
        return places + base

    def tensor_load(self, to, descriptor, coordinates, barrier_address, mask, site):
        for lane, program, place in self._each(barrier_address, mask, site):
            barrier = self._mbarrier(program, place, site)
            about, address, inside, tile = self._box(descriptor[lane], [c[lane] for c in coordinates], site)
            values = np.full(address.size, 0, f"u{about.element}")
            if about.nan:
                values[:] = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}[about.element]
            wanted = address[inside].astype(u8)
            for region, some in self.pool.memory.split(wanted, about.element, self.sites[site], "load"):
                chosen = np.flatnonzero(inside) if some is None else np.flatnonzero(inside)[some]
                rows = (address[chosen] - (region.start & ~15)) // about.element
                values[chosen] = region.view(about.element, 1)[rows]
            if self.pool.options.traffic:
                self._count_sectors(wanted, np.full(wanted.size, lane), about.element, "load")
            if int(to[lane]) % 128 or int(to[lane]) + tile.size * about.element > self.pool.n_shared:
                self.pool.report.note("tensor copy to a wrong place", self.sites[site], f"byte {int(to[lane])}")
                continue
            chunk = 16 // about.element
            places = self._tile_places(about, int(self.base[lane]), int(to[lane]), tile[::chunk])
            data = values.reshape(-1, chunk).view(u8)
            self._in_flight(places, 16, site)
            self.pool.shared.begin_copy(places, 16, np.full(places.size, self.stamps[lane]), self.sites[site])
            if barrier is not None:
                barrier.copies.append((places, data))

    def tensor_store(self, descriptor, coordinates, of, mask, site):
        for lane, _, place in self._each(of, mask, site):
            self.loose_stores.append(
                (int(lane), int(descriptor[lane]), [int(c[lane]) for c in coordinates], place, site)
            )
            about, _, _, tile = self._box(descriptor[lane], [c[lane] for c in coordinates], site)
            chunk = 16 // about.element
            places = self._tile_places(about, int(self.base[lane]), place, tile[::chunk])
            self.pool.shared.read(places, 16, np.full(places.size, self.stamps[lane]), self.sites[site])
            self._fenced(places, 16, site)

    def bulk_commit(self, mask):
        self.store_groups.append(self.loose_stores)
        self.loose_stores = []

    def bulk_wait(self, n_left, mask):
        while len(self.store_groups) > n_left:
            for copy in self.store_groups.pop(0):
                self._store_tile(*copy)

    def finish(self):
        """At the end of a program, let all copies arrive."""
        self.bulk_commit(None)
        self.bulk_wait(0, None)
        self.wgmma_commit(None)
        self.wgmma_wait(0, None, None)

    def _store_tile(self, lane, descriptor, coordinates, place, site):
        about, address, inside, tile = self._box(descriptor, coordinates, site)
        places = self._tile_places(about, int(self.base[lane]), place, tile)
        values = self.pool.shared.view(about.element, 1)[places // about.element]
        wanted = address[inside].astype(u8)
        for region, some in self.pool.memory.split(wanted, about.element, self.sites[site], "store"):
            chosen = np.flatnonzero(inside) if some is None else np.flatnonzero(inside)[some]
            rows = (address[chosen] - (region.start & ~15)) // about.element
            region.view(about.element, 1)[rows] = values[chosen]
            if self.pool.options.global_races:
                stamps = np.full(chosen.size, self.stamps[lane])
                self.pool.memory.mark(region, address[chosen].astype(u8), about.element, stamps, True, self.sites[site])
        if self.pool.options.traffic:
            self._count_sectors(wanted, np.full(wanted.size, lane), about.element, "store")

    # --- products of four warps -------------------------------------------------------------------------------------

    @staticmethod
    @lru_cache(256)
    def _matrix_places(bits, rows, k, element, k_is_inner):
        """The places of the elements (rows, k) of a tile, in bytes, and the chunks of 16 bytes that they are in."""
        places = Hopper._element_places(bits, rows, k, element, k_is_inner).ravel()
        return places, np.unique(places >> 4) << 4

    @staticmethod
    def _element_places(bits, rows, k, element, k_is_inner):
        start, leading, stride = (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4
        mode, row, inner = bits >> 62, np.arange(rows)[:, None], np.arange(k)[None, :]
        if bits >> 49 & 7:
            raise Fault("a matrix descriptor with a base offset")
        if mode == 0:
            unit = 16 // element
            if k_is_inner:
                return start + row // 8 * stride + row % 8 * 16 + inner // unit * leading + inner % unit * element
            return start + row // unit * stride + row % unit * element + inner // 8 * leading + inner % 8 * 16
        width = _MATRIX_ROWS[mode]
        if k_is_inner:
            places = start + row // 8 * stride + row % 8 * width + inner * element
        else:
            unit = width // element
            places = start + row // unit * leading + row % unit * element + inner // 8 * stride + inner % 8 * width
        return swizzled(places, width)

    def warpgroup_multiply(self, shape, dtype, accumulators, left, right, keep, flags, mask, site):
        m, n, k = matrix.sizes(shape)
        element = 4 if dtype == "tf32" else 2
        groups = list(range(self.width // 128))
        if mask is not None:
            by_group = mask.reshape(-1, 128)
            if (by_group.any(1) != by_group.all(1)).any():
                self.pool.report.note("wgmma by a part of its warps", self.sites[site], "")
            groups = [g for g in groups if by_group[g].all()]
        a_in_registers = isinstance(left, tuple)
        scale_a, scale_b, *transposed = flags
        transpose_a, transpose_b = (0, *transposed) if len(transposed) == 1 else transposed or (0, 0)
        product = np.zeros((self.width // 128, m, n))
        if a_in_registers:
            a = matrix._matrix(left, dtype, 16, k).reshape(-1, 64, k)
        for group in groups:
            lane = 128 * group
            base = int(self.base[lane])
            touched = []
            if a_in_registers:
                a_group = a[group]
            else:
                a_group = self._read_tile(
                    int(left[lane]), m, k, element, not transpose_a, dtype, base, lane, site, touched
                )
            b_group = self._read_tile(
                int(right[lane]), n, k, element, not transpose_b, dtype, base, lane, site, touched
            )
            product[group] = (scale_a * scale_b) * (a_group @ b_group.T)
            for places in touched:
                self.loose_products.append((places, self.pool.shared.view(2, 1)[places >> 1].copy(), site))
        self.pool.report.counts[f"{dtype} FLOPs"] += 2 * m * n * k * len(groups)
        # (groups, warps, halves of 8 rows, lanes / 4, column tiles, lanes % 4, 2)
        parts = product.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, self.width)
        return (parts + np.where(keep, np.stack(accumulators), np.float32(0))).astype(np.float32)

    def _read_tile(self, bits, rows, k, element, k_is_inner, dtype, base, lane, site, touched):
        places, chunks = self._matrix_places(bits, rows, k, element, k_is_inner)
        if int(chunks[-1]) + 16 > self.pool.n_shared:
            self.pool.report.note("wgmma reads outside of shared memory", self.sites[site], f"byte {int(chunks[-1])}")
            return np.zeros((rows, k))
        flat, chunks = places + base, chunks + base
        shared = self.pool.shared
        shared.read(chunks, 16, np.full(chunks.size, self.stamps[lane] | WARPS), self.sites[site])
        shared.check_waited(chunks, 16, self.stamps[lane : lane + 128 : 32], self.sites[site])
        self._fenced(chunks, 16, site)
        touched.append(flat)
        if element == 4:
            return matrix.values(shared.view(4, 1)[flat >> 2], "tf32").reshape(rows, k)
        halves = shared.view(2, 1)[flat >> 1]
        return matrix.halves(halves, dtype).reshape(rows, k)

    def wgmma_commit(self, mask):
        self.product_groups.append(self.loose_products)
        self.loose_products = []

    def wgmma_wait(self, n_left, mask, site):
        """Check that operands in shared memory have not changed before the product is waited for."""
        while len(self.product_groups) > n_left:
            for places, before, issued in self.product_groups.pop(0):
                if (self.pool.shared.view(2, 1)[places >> 1] != before).any():
                    self.pool.report.note("operand of a wgmma overwritten before its wait", self.sites[issued], "")
