"""How the lanes of a warp exchange values: shuffles, reductions, votes, and the election of one lane."""

from typing import Any

import numpy as np

u4, u8 = np.uint32, np.uint64


class Shuffles:
    """Part of a team, whose fields it uses. None as a mask means all lanes."""

    width: Any
    lane: Any
    caches: Any

    def shuffle(self, mode, b, c):
        """`shuffle_by` with the same operands in all lanes, remembered."""
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
        """redux.sync: one value from the 32 lanes of a warp, in all of them."""
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                    "xor": np.bitwise_xor}[operation]  # fmt: skip
        result = function.reduce(values.reshape(-1, 32), axis=1, dtype=values.dtype)
        return np.repeat(result, 32)

    def vote(self, mode, chosen, mask):
        """vote.sync: for ballot the chosen lanes of a warp as bits, for any, all and uni one answer in its lanes."""
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
        """elect.sync: true in the first active lane of each warp."""
        if mask is None:
            return self.lane == 0
        by_warp = mask.reshape(-1, 32)
        first = np.zeros_like(by_warp)
        rows = np.flatnonzero(by_warp.any(1))
        first[rows, by_warp[rows].argmax(1)] = True
        return first.ravel()
