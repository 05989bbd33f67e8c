"""Launch configurations of the MLP's products, by dtype and chip."""

from typing import NamedTuple

import torch

from ...common.chip import resident_programs


class ProductTile(NamedTuple):
    """A program's tile of a product, and its block of the inner axis.

    block_cols: at least 64, because epilogues work on quarters of at least 16 columns. n_resident: programs that share
    a multiprocessor and walk the tiles through tensor descriptors; 0 for one program per tile, with pointers.
    """

    block_rows: int
    block_cols: int
    block_inner: int
    num_warps: int
    num_stages: int
    n_resident: int = 0


# Two programs with up to 128 registers per thread and 112 KiB each fill a multiprocessor: one multiplies while the
# other runs its epilogue. Compiled, not timed.
_PRODUCT_DESCRIPTORS_HOPPER = ProductTile(128, 128, 64, 8, 3, n_resident=2)
# The epilogue of a float32 stream takes 16 KiB more, so that two programs would have two stages each. One with five has
# 128 KiB on the way in place of 64: its loads go on during its epilogues, which by count costs as much as two programs
# that hide each other's, and less where a multiprocessor has one tile. Compiled, not timed.
_PRODUCT_OF_WIDE_STREAM_HOPPER = ProductTile(128, 128, 64, 8, 5, n_resident=1)
# A program with twice as many columns asks L2 for three quarters of the operands, and L2 limits these kernels. It has a
# multiprocessor to itself, so that nothing hides its epilogue. Predicted by counts, not timed.
_WIDE_PRODUCT_DESCRIPTORS_HOPPER = ProductTile(128, 256, 64, 8, 3, n_resident=1)
# With fewer wide tiles for each multiprocessor, those that come last or stay idle cost more than L2 gains.
_WIDE_TILES_PER_MULTIPROCESSOR = 2
# By bytes per element; compiled without spills for every audited GPU, not timed. In half precision 32 inner elements
# keep three stages within the 64 KiB of gfx942. float64, and float32 that is not rounded to tf32, use no tensor cores
# here; with more stages in float32, triton 3.6 or 3.9 spills a few bytes on sm_86 and sm_120.
_PRODUCT = {2: ProductTile(128, 128, 32, 8, 3), 4: ProductTile(64, 64, 32, 8, 1), 8: ProductTile(32, 64, 16, 8, 2)}
# For rows that do not start at multiples of 16 bytes, whose elements are loaded one by one.
_PRODUCT_OF_ODD_ROWS = {**_PRODUCT, 2: ProductTile(64, 128, 32, 8, 3), 4: ProductTile(32, 64, 32, 8, 1)}
# Replacements on sm_100, by bytes per element and `describable`, because triton 3.7.1 spills a few bytes of the tiles
# above: compiled, not timed.
_PRODUCT_SM100 = dict.fromkeys(((4, False), (8, True), (8, False)), ProductTile(32, 64, 16, 4, 1))
# The interpreter sums a column of a tile row by row, not as a tree: with few rows it errs as little as eager torch.
_PRODUCT_OF_CPU = ProductTile(32, 128, 64, 4, 2)


class RowsTile(NamedTuple):
    """A program's tile of a matrix that it reads once."""

    block_rows: int
    block_cols: int
    num_warps: int


# Each thread holds eight elements of one row: compiled, not timed.
GELU_MLP_BWD_PRODUCT = RowsTile(16, 128, 8)
_ROW_PROGRAMS_PER_MULTIPROCESSOR = 4


def is_large_product(n_rows: int, n_cols: int, n_multiprocessors: int) -> bool:
    """Whether a product (n_rows, n_cols) has enough wide tiles to keep all multiprocessors of Hopper at work."""
    wide = _WIDE_PRODUCT_DESCRIPTORS_HOPPER
    n_tiles = -(-n_rows // wide.block_rows) * -(-n_cols // wide.block_cols)
    return n_cols >= wide.block_cols and n_tiles > _WIDE_TILES_PER_MULTIPROCESSOR * n_multiprocessors


def product_tile(
    kernel: str, element_size: int, result_size: int, architecture: str, describable: bool, large: bool
) -> ProductTile:
    """The tile of a fused product.

    kernel: hidden, out or pre, so that each can be tuned; none has a tile of its own yet. element_size, result_size:
    bytes of the dtypes of the operands and of the result, which differ under autocast. describable: tensor descriptors
    can hold all of its matrices. large: by `is_large_product`.
    """
    if architecture == "cpu":
        return _PRODUCT_OF_CPU
    if architecture == "sm_90" and element_size == 2 and describable:
        # Beside the operands of a wide tile, shared memory has no room for a float64 stream.
        if large and result_size < 8:
            return _WIDE_PRODUCT_DESCRIPTORS_HOPPER
        return _PRODUCT_DESCRIPTORS_HOPPER if result_size == 2 else _PRODUCT_OF_WIDE_STREAM_HOPPER
    if architecture == "sm_100" and (element_size, describable) in _PRODUCT_SM100:
        return _PRODUCT_SM100[element_size, describable]
    return (_PRODUCT if describable else _PRODUCT_OF_ODD_ROWS)[element_size]


def gelu_mlp_row_programs(device: torch.device, n_row_tiles: int, n_col_tiles: int) -> int:
    """How many programs share the rows of a column tile, which is the number of partial bias gradients."""
    return min(n_row_tiles, -(-resident_programs(device, _ROW_PROGRAMS_PER_MULTIPROCESSOR) // n_col_tiles))
