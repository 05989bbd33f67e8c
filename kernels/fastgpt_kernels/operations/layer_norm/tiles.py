"""Launch configurations of LayerNorm, by width and chip."""

from functools import cache
from typing import NamedTuple

from torch import Tensor

from ...common.chip import resident_programs


class LayerNormTile(NamedTuple):
    """A program's tile: block_cols covers a whole row."""

    block_cols: int
    block_rows: int
    num_warps: int


# Compiled without spills for every audited GPU, not timed. Backward places its warps side by side along a row, so that
# each thread sums the weight gradients of its own columns without exchanges between threads.
_LAYER_NORM_FWD = (
    LayerNormTile(256, 4, 2),
    LayerNormTile(512, 4, 4),
    LayerNormTile(1024, 2, 4),
    LayerNormTile(2048, 1, 4),
    LayerNormTile(4096, 1, 8),
)
_LAYER_NORM_BWD = (
    LayerNormTile(256, 2, 1),
    LayerNormTile(512, 2, 2),
    LayerNormTile(1024, 2, 4),
    LayerNormTile(2048, 2, 8),
    LayerNormTile(4096, 1, 8),
)
# Replacements on GPUs where triton (3.6 to 3.9) spills a register of the tiles above: compiled, not timed.
_LAYER_NORM_BWD_AMPERE = {512: LayerNormTile(512, 2, 4), 1024: LayerNormTile(1024, 2, 8)}
_LAYER_NORM_ON = {
    ("bwd", "sm_80"): _LAYER_NORM_BWD_AMPERE,
    ("bwd", "sm_86"): _LAYER_NORM_BWD_AMPERE,
    ("bwd", "sm_89"): _LAYER_NORM_BWD_AMPERE,
    ("fwd", "sm_90"): {4096: LayerNormTile(4096, 1, 16)},
    # By count for 1024: with 4 warps, a third more instructions and half as many bytes in flight.
    ("bwd", "sm_90"): {512: LayerNormTile(512, 1, 2), 1024: LayerNormTile(1024, 1, 2)},
    ("bwd", "sm_120"): {
        512: LayerNormTile(512, 1, 2),
        1024: LayerNormTile(1024, 1, 4),
        2048: LayerNormTile(2048, 1, 8),
        4096: LayerNormTile(4096, 1, 16),
    },
}
# The widest rows whose gradient backward writes in two dtypes: wider ones spill a register on sm_90 with triton 3.6.
LAYER_NORM_TWO_DTYPES_COLS = 2048
# Columns that one program of the reduction kernel sums, one sector of memory in float32, and its warps: by count.
LAYER_NORM_REDUCE_COLS, LAYER_NORM_REDUCE_WARPS = 8, 8

# How many warps a multiprocessor holds with 128 registers per thread. Half precision takes no more on sm_90, by count.
_BWD_WARPS_PER_MULTIPROCESSOR = 16


def layer_norm_tiles(kernel: str, architecture: str) -> tuple[LayerNormTile, ...]:
    """All tiles of a kernel, fwd or bwd, narrowest first."""
    tiles = _LAYER_NORM_FWD if kernel == "fwd" else _LAYER_NORM_BWD
    exceptions = _LAYER_NORM_ON.get((kernel, architecture), {})
    return tuple(exceptions.get(tile.block_cols, tile) for tile in tiles)


@cache
def layer_norm_tile(kernel: str, n_cols: int, architecture: str) -> LayerNormTile:
    """The narrowest tile of a kernel, fwd or bwd, that holds a row of n_cols."""
    return next(tile for tile in layer_norm_tiles(kernel, architecture) if n_cols <= tile.block_cols)


def layer_norm_reduce_partials(architecture: str) -> int:
    """Partial rows that one program of the reduction kernel sums at a time; fewer where 256 spill, not timed."""
    return 128 if architecture in ("sm_80", "sm_120") else 256


def layer_norm_bwd_programs(x: Tensor, tile: LayerNormTile) -> int:
    """How many programs share the rows of x in backward, which is the number of partial weight gradients."""
    return resident_programs(x.device, max(1, _BWD_WARPS_PER_MULTIPROCESSOR // tile.num_warps))
