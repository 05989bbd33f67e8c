"""Launch configurations of the decode step's kernels, by shape and chip."""

from typing import NamedTuple

import torch

from ...common.chip import resident_programs

# Wider rows do not take the fused kernels, whose programs hold all rows of the stream.
DECODE_MAX_CHANNELS = 2048
# The longest part of the inner axis that a program of the two products into the stream takes.
_DECODE_PART_COLS = 1024
# Programs that use the memory's bandwidth, and keys that a program of attention reads at a time: not timed.
_DECODE_PROGRAMS, DECODE_BLOCK_KEYS, DECODE_ATTENTION_WARPS, DECODE_ATTENTION_STAGES = 128, 32, 4, 2
_DECODE_HEAD_PROGRAMS_PER_MULTIPROCESSOR = 2
# The next product merges all splits in an unrolled loop: of one head in 128, triton 3.7.1 compiled 93 s and spilled.
_DECODE_MAX_SPLITS = 32

# Of the product kernel: the most rows of a tile; of a part of the inner axis the columns of the weights and the inner
# columns that a program takes at a time.
_PRODUCT_MAX_BLOCK_ROWS, _PRODUCT_PART_OUT, _PRODUCT_PART_COLS = 64, 64, 128

# Blocks of more columns of the inner axis are wide: fewer of their rows and columns fit into registers.
_NARROW_COLS = 1024

# The fewest columns of the inner axis that a product on tensor cores takes; triton compiles none with fewer.
_TENSOR_CORE_COLS = 16
# The same of int4: triton up to 3.7.1 gives each of four lanes 8 columns of what `tl.join` made (kWidth = 8), so that
# of 16 columns a product has 8 twice and 8 not at all. With 3.8.0 it is right.
_TENSOR_CORE_INT4_COLS = 32


class DecodeTile(NamedTuple):
    """A program's share of a product: all rows, block_cols of the inner axis, block_out columns of the weights.

    slices: of the inner axis, one for each warp, on tensor cores; 0 without them.
    """

    block_rows: int
    block_cols: int
    block_out: int
    num_warps: int
    num_stages: int
    slices: int = 0


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _has_tensor_cores(element_size: int, architecture: str) -> bool:
    """Whether a few rows are multiplied on tensor cores.

    Not in float32, in which none are exact, nor on AMD, where triton needs more registers and shared memory than exist.
    """
    return element_size < 4 and not architecture.startswith("gfx")


def decode_max_rows(n_channels: int, element_size: int, architecture: str, group: int = 0) -> int:
    """How many rows the fused kernels take. Every program repeats the norm, so that more rows cost more than a launch.

    element_size: bytes of the weights' dtype, 1 for int8 and int4. group: weights that share a step, 0 without steps.
    """
    if n_channels > DECODE_MAX_CHANNELS:
        return 0
    # A head of 8 rows spills 4 bytes in int8 on sm_100 with triton 3.6, in int4 4 to 12 on sm_80, sm_89 and sm_120.
    spills = group > 0 or (element_size == 1 and architecture == "sm_100")
    return 8 if n_channels <= 1024 and _has_tensor_cores(element_size, architecture) and not spills else 4


def decode_tile(
    kernel: str, n_rows: int, n_cols: int, element_size: int, architecture: str, group: int = 0
) -> DecodeTile:
    """The tile of a kernel, norm_product, project or head: compiled, not timed.

    n_cols: columns of the inner axis that a program takes. element_size: bytes of the weights' dtype, 1 for int8 and
    int4. group: weights that share a step, which a block holds whole; 0 where there are no steps.
    """
    block_cols = _power_of_two(max(16, n_cols, group))
    spills = kernel == "head" and n_rows > 1 and block_cols > _NARROW_COLS
    if _has_tensor_cores(element_size, architecture) and not spills:
        tile = _tile_on_tensor_cores(kernel, n_rows, block_cols, group)
    else:
        tile = _tile_without_tensor_cores(kernel, n_rows, block_cols, element_size, architecture, group)
    # In the interpreter few programs, because starting one takes longer than its work.
    return tile._replace(block_out=64) if architecture == "cpu" else tile


def _tile_on_tensor_cores(kernel: str, n_rows: int, block_cols: int, group: int) -> DecodeTile:
    is_wide = block_cols > _NARROW_COLS
    num_warps = 16 if kernel == "norm_product" and is_wide and n_rows > 1 else 8
    # By count: with twice the columns, half as many programs repeat the norm.
    block_out = 32 if kernel == "norm_product" and n_rows > 2 and not is_wide else 16
    num_stages = 2 if is_wide or n_rows > 4 else 3
    cols_of_slice = _TENSOR_CORE_INT4_COLS if group else _TENSOR_CORE_COLS
    block_cols = max(block_cols, cols_of_slice * num_warps)  # Narrower ones are masked.
    return DecodeTile(_power_of_two(n_rows), block_cols, block_out, num_warps, num_stages, slices=num_warps)


def _tile_without_tensor_cores(
    kernel: str, n_rows: int, block_cols: int, element_size: int, architecture: str, group: int
) -> DecodeTile:
    is_wide = block_cols > _NARROW_COLS
    is_whole = kernel == "head" or element_size == 1  # rows of the head and columns of int8 are read whole
    num_warps = min(4 * (2 if is_wide else 1) * (2 if n_rows > 1 else 1), 8 if is_whole else 16)
    if kernel == "norm_product" and architecture in ("sm_80", "sm_86", "sm_89", "sm_90"):  # 4 warps spill there.
        num_warps = max(num_warps, 8)
    # 32 bytes, one memory sector, of every row of the weights.
    block_out = min(16, 32 // element_size) if not is_whole or n_rows == 1 else 8
    if is_wide and n_rows > 2:  # With 4 columns, an int8 head spills a register on sm_90 with triton 3.7.
        block_out = 2 if kernel == "head" and element_size == 1 else block_out // 2
    if group and is_wide and n_rows > 2 and kernel == "head":  # 8 warps spill 24 bytes with triton 3.6.
        num_warps = 16
    return DecodeTile(_power_of_two(n_rows), block_cols, block_out, num_warps, num_stages=2)


def decode_multiplies(n_rows: int, element_size: int, architecture: str) -> bool:
    """Whether rows that the fused kernels do not take go through the product kernel. If not, torch multiplies.

    element_size: bytes of the weights' dtype, 1 for int8 and int4, which torch does not multiply.
    """
    # By count not slower than torch up to 64 rows, where launches overlap.
    is_expected = n_rows <= 64 and architecture in ("cpu", "sm_90", "sm_100", "sm_120")
    return element_size == 1 or (element_size == 2 and is_expected)


def decode_product_tile(
    n_rows: int, n_out: int, n_parts: int, element_size: int, weight_size: int, architecture: str, group: int = 0
) -> DecodeTile:
    """The tile of the product kernel: by count for half precision on sm_90, not timed.

    n_parts: of the inner axis. element_size, weight_size: bytes of the dtype of the rows and of the weights.
    group: as for `decode_tile`.
    """
    block_rows = min(_PRODUCT_MAX_BLOCK_ROWS, _power_of_two(max(16, n_rows)))
    if architecture == "cpu":
        return DecodeTile(block_rows, max(64, group), 64, 4, 2)
    if weight_size == 1:
        # float32 has no exact tensor cores.
        block_cols = 128 if element_size == 2 else max(32, group)
        # Of int4 and 64 rows, 4 warps spill 8 bytes on sm_120.
        num_warps = 2 if block_rows == 16 else 8 if group and block_rows == _PRODUCT_MAX_BLOCK_ROWS else 4
        return DecodeTile(block_rows, block_cols, 16 if block_rows == 16 else 32, num_warps, 4)
    # Of 32 rows, tensor cores of sm_90 take no less work than of 64.
    block_rows, num_warps = (16, 4) if n_rows <= 16 else (_PRODUCT_MAX_BLOCK_ROWS, 8)
    # So wide that every multiprocessor has at most one program.
    block_out = _PRODUCT_PART_OUT if n_parts > 1 or n_out > 4096 else 32
    is_long = n_parts == 1 and (block_rows == 16 or block_out == 32)
    return DecodeTile(block_rows, 256 if is_long else _PRODUCT_PART_COLS, block_out, num_warps, 2)


def decode_product_parts(n_rows: int, n_cols: int, n_out: int) -> tuple[int, int]:
    """As `decode_parts`, for the product kernel: the same for all numbers of rows that one tile holds."""
    n_tiles = -(-n_rows // _PRODUCT_MAX_BLOCK_ROWS) * -(-n_out // _PRODUCT_PART_OUT)
    n_blocks = -(-n_cols // _PRODUCT_PART_COLS)
    blocks = -(-n_blocks // max(1, _DECODE_PROGRAMS // n_tiles))
    return -(-n_blocks // blocks), blocks * _PRODUCT_PART_COLS


def decode_parts(n_cols: int, n_out: int, group: int = 0) -> tuple[int, int]:
    """How many parts split-K divides the inner axis of a product into the stream into, and the columns of a part.

    group: as for `decode_tile`.
    """
    n_tiles = -(-n_out // 16)
    n_parts = max(-(-n_cols // _DECODE_PART_COLS), min(-(-_DECODE_PROGRAMS // n_tiles), -(-n_cols // 128)))
    cols = -(-n_cols // n_parts)
    multiple = max(16, group)
    cols = -(-cols // multiple) * multiple
    return -(-n_cols // cols), cols


def decode_splits(n_row_heads: int, n_slots: int, architecture: str) -> int:
    """How many programs share the keys of one head of one row."""
    n_blocks = -(-n_slots // DECODE_BLOCK_KEYS)
    most = 3 if architecture == "cpu" else min(_DECODE_PROGRAMS // n_row_heads, _DECODE_MAX_SPLITS)
    return max(1, min(most, n_blocks))


def decode_head_programs(device: torch.device) -> int:
    """How many programs share the tiles of the head."""
    return resident_programs(device, _DECODE_HEAD_PROGRAMS_PER_MULTIPROCESSOR)
