"""Launch configurations: fixed tables keyed by shape and GPU, each with a line on where it comes from.

Nothing is searched at run time: the first call is as fast as the next, and graph capture meets no measurement.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Chip(NamedTuple):
    """What the tables ask of a device. architecture: sm_90, gfx942, or cpu, which is the interpreter."""

    architecture: str
    n_multiprocessors: int


_assumed: Chip | None = None


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Choose as for a chip that need not be there, whatever holds the tensors: what the audit compiles."""
    global _assumed
    previous, _assumed = _assumed, chip
    try:
        yield
    finally:
        _assumed = previous


@cache
def _chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(device.type, 1)
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Chip(name, properties.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """What launches on a device are chosen for."""
    return _assumed or _chip_of(device)


def architecture(device: torch.device) -> str:
    """What the kernels for a device are compiled for: sm_90, gfx942, or cpu, which is the interpreter."""
    return chip(device).architecture


# In the interpreter few, so that each has several tiles to walk.
_PROGRAMS_OF_CPU = 3


def resident_programs(device: torch.device, n_resident: int) -> int:
    """How many programs of a kernel a device holds at n_resident a multiprocessor."""
    name, n_multiprocessors = chip(device)
    return _PROGRAMS_OF_CPU if name == "cpu" else n_resident * n_multiprocessors


# --- layer norm -----------------------------------------------------------------------------------------------------


class LayerNormTile(NamedTuple):
    """A program's tile: block_cols covers a whole row."""

    block_cols: int
    block_rows: int
    num_warps: int


# Compiled for every audited GPU without spills, unmeasured. Backward keeps the warps side by side along a row, so that
# a thread sums the weight gradients of its columns alone.
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
# Where a compiler (triton 3.6 to 3.9) spills a word of the tiles above on one GPU: compiled, unmeasured.
_LAYER_NORM_ON = {
    ("bwd", "sm_80"): {512: LayerNormTile(512, 1, 2), 1024: LayerNormTile(1024, 1, 8)},
    ("fwd", "sm_90"): {4096: LayerNormTile(4096, 1, 16)},
    ("bwd", "sm_90"): {512: LayerNormTile(512, 1, 2), 1024: LayerNormTile(1024, 1, 4)},
    ("bwd", "sm_120"): {
        512: LayerNormTile(512, 1, 2),
        1024: LayerNormTile(1024, 1, 4),
        4096: LayerNormTile(4096, 1, 16),
    },
}
# Columns that a program of the second backward kernel adds up: unmeasured.
LAYER_NORM_REDUCE_COLS = 16

# Resident programs of 4 warps with up to 128 registers a thread: unmeasured.
_BWD_PROGRAMS_PER_MULTIPROCESSOR = 4


def layer_norm_tiles(kernel: str, architecture: str) -> tuple[LayerNormTile, ...]:
    """All tiles of one of the kernels fwd and bwd, the narrowest first."""
    tiles = _LAYER_NORM_FWD if kernel == "fwd" else _LAYER_NORM_BWD
    exceptions = _LAYER_NORM_ON.get((kernel, architecture), {})
    return tuple(exceptions.get(tile.block_cols, tile) for tile in tiles)


def layer_norm_tile(kernel: str, n_cols: int, architecture: str) -> LayerNormTile:
    """The narrowest tile of one of the kernels fwd and bwd that holds a row of n_cols."""
    return next(tile for tile in layer_norm_tiles(kernel, architecture) if n_cols <= tile.block_cols)


def layer_norm_reduce_partials(architecture: str) -> int:
    """Partial rows that a program of the second backward kernel adds up at a time; unmeasured, spills as above."""
    return 32 if architecture in ("sm_80", "sm_120") else 64


def layer_norm_bwd_programs(x: Tensor) -> int:
    """How many programs share the rows of x in backward: the number of partial sums of the weight gradients."""
    return resident_programs(x.device, _BWD_PROGRAMS_PER_MULTIPROCESSOR)


# --- attention ------------------------------------------------------------------------------------------------------


class AttentionTile(NamedTuple):
    """A program's tile of scores, in queries and keys."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# By kernel, bytes of an element, and the head size up to which it holds: compiled, unmeasured. float32 has no
# tensor-core product, so its accumulators set the tile.
ATTENTION = {
    ("fwd", 2, 64): AttentionTile(64, 64, 4, 3),
    ("fwd", 2, 128): AttentionTile(128, 64, 8, 2),
    ("fwd", 4, 64): AttentionTile(64, 32, 8, 2),
    ("fwd", 4, 128): AttentionTile(16, 32, 8, 1),
    ("dq", 2, 64): AttentionTile(64, 64, 4, 3),
    ("dq", 2, 128): AttentionTile(64, 32, 4, 2),
    ("dq", 4, 64): AttentionTile(32, 32, 8, 2),
    ("dq", 4, 128): AttentionTile(16, 16, 4, 2),
    ("dkdv", 2, 64): AttentionTile(32, 64, 4, 2),
    ("dkdv", 2, 128): AttentionTile(32, 64, 8, 2),
    ("dkdv", 4, 64): AttentionTile(32, 32, 8, 2),
    ("dkdv", 4, 128): AttentionTile(16, 16, 4, 2),
}
# Without wgmma operands take registers, which leaves room for fewer scores: compiled, unmeasured.
_ATTENTION_OFF_HOPPER = {
    ("fwd", 2, 128): AttentionTile(64, 32, 4, 2),
    ("dq", 2, 64): AttentionTile(64, 32, 4, 3),
    ("dq", 2, 128): AttentionTile(32, 32, 4, 2),
    ("dkdv", 2, 64): AttentionTile(32, 32, 4, 2),
    ("dkdv", 2, 128): AttentionTile(32, 32, 4, 2),
}
# With 8 warps and no dropout two programs stay on a multiprocessor, as with 4 warps, and each key is read half as
# often: compiled for sm_90, unmeasured.
_ATTENTION_FWD_HOPPER = AttentionTile(128, 64, 8, 3)
# Where a compiler (triton 3.6 or 3.9) spills a few bytes of the tiles above on one GPU: compiled, unmeasured.
_ATTENTION_SM86 = {("dq", 2, 128): AttentionTile(64, 32, 8, 2), ("dkdv", 4, 128): AttentionTile(16, 16, 8, 2)}
_ATTENTION_ON = {
    "sm_80": {
        ("fwd", 4, 64): AttentionTile(64, 32, 8, 1),
        ("fwd", 4, 128): AttentionTile(16, 16, 4, 2),
        ("dq", 4, 64): AttentionTile(32, 32, 4, 2),
        ("dkdv", 4, 64): AttentionTile(16, 32, 8, 2),
        ("dkdv", 4, 128): AttentionTile(16, 32, 8, 1),
    },
    "sm_86": _ATTENTION_SM86,
    "sm_89": _ATTENTION_SM86,
    "sm_90": {("fwd", 4, 128): AttentionTile(16, 16, 4, 2)},
    "sm_100": {
        ("fwd", 4, 128): AttentionTile(16, 16, 4, 2),
        ("dq", 2, 128): AttentionTile(32, 32, 4, 1),
        ("dkdv", 4, 128): AttentionTile(16, 16, 8, 2),
    },
    "sm_120": {
        ("fwd", 2, 128): AttentionTile(64, 32, 8, 2),
        ("dq", 2, 128): AttentionTile(32, 32, 8, 2),
        ("dq", 4, 64): AttentionTile(16, 32, 4, 2),
    },
    "gfx942": {("dkdv", 2, 128): AttentionTile(16, 32, 4, 2)},
}


def attention_tile(
    kernel: str, head_dim: int, element_size: int, architecture: str, has_dropout: bool
) -> AttentionTile:
    """The tile of one of the kernels fwd, dq and dkdv.

    element_size: bytes of q's dtype. architecture: as `architecture` names it.
    """
    padded_dim = 64 if head_dim <= 64 else 128
    if architecture == "cpu":
        # NumPy adds up the products of a small tile in another order than those of a large one: the passes would not
        # agree about a score. On a GPU the order is that of the head's elements in any tile.
        return ATTENTION[kernel, 2, padded_dim]
    key = kernel, element_size, padded_dim
    if architecture == "sm_90" and key == ("fwd", 2, 64) and not has_dropout:
        return _ATTENTION_FWD_HOPPER
    special = {} if architecture == "sm_90" else _ATTENTION_OFF_HOPPER
    tile = _ATTENTION_ON.get(architecture, {}).get(key) or special.get(key) or ATTENTION[key]
    # A thread of AMD's has 512 registers only where a program has no more than 4 warps.
    return tile._replace(num_warps=4) if architecture.startswith("gfx") else tile


# --- linear + cross-entropy -----------------------------------------------------------------------------------------

# Lanes of a tile, each of which takes 16 bytes of a row, and the warps that share them. Two accesses a thread are under
# way, and with 32 registers a thread (bfloat16 on sm_90) eight programs fill a multiprocessor: compiled, unmeasured.
LINEAR_CROSS_ENTROPY_LANES, LINEAR_CROSS_ENTROPY_WARPS = 512, 8
# Bytes of the logits that exist at once: 2**27 of them in half precision. A chunk reads and writes the gradient of the
# weight once in float32, so that larger chunks cost less time; unmeasured.
LINEAR_CROSS_ENTROPY_BYTES = 2**28
# Rows of a chunk fill whole tiles of a matrix product.
_CHUNK_ROWS_MULTIPLE = 128


def linear_cross_entropy_chunk_rows(n_rows: int, n_bytes: int) -> int:
    """How many rows of logits, n_bytes each, exist at once: chunks of nearly one size, in whole tiles."""
    most = max(1, LINEAR_CROSS_ENTROPY_BYTES // max(1, n_bytes * _CHUNK_ROWS_MULTIPLE)) * _CHUNK_ROWS_MULTIPLE
    n_chunks = -(-n_rows // most)
    rows = -(-n_rows // max(1, n_chunks))
    return -(-rows // _CHUNK_ROWS_MULTIPLE) * _CHUNK_ROWS_MULTIPLE


# --- gelu_mlp -------------------------------------------------------------------------------------------------------


class ProductTile(NamedTuple):
    """A program's tile of a product, and how far it goes along the inner axis at a time.

    block_cols: at least 64, for an epilogue takes quarters of 16 columns or more. n_resident: programs that share a
    multiprocessor and walk the tiles through tensor descriptors; 0 for one program a tile, with pointers.
    """

    block_rows: int
    block_cols: int
    block_inner: int
    num_warps: int
    num_stages: int
    n_resident: int = 0


# Two programs of up to 128 registers and 112 KiB fill a multiprocessor: one multiplies while the other is in its
# epilogue. Compiled, unmeasured.
_PRODUCT_DESCRIPTORS_HOPPER = ProductTile(128, 128, 64, 8, 3, n_resident=2)
# By bytes of an element, compiled without spills for every audited GPU, unmeasured: 32 inner elements in half precision
# keep three stages within the 64 KiB of gfx942, and float32 and float64 have no tensor-core product here; with more
# stages in float32, triton 3.6 or 3.9 spills a few bytes on sm_86 and sm_120.
_PRODUCT = {2: ProductTile(128, 128, 32, 8, 3), 4: ProductTile(64, 64, 32, 8, 1), 8: ProductTile(32, 64, 16, 8, 2)}
# For rows that do not start at multiples of 16 bytes, whose elements are addressed one by one.
_PRODUCT_OF_ODD_ROWS = {**_PRODUCT, 2: ProductTile(64, 128, 32, 8, 3)}
# Of these chips one of the compilers (triton 3.6 to 3.9) spills a few bytes of the float32 tile above.
_PRODUCT_OF_ODD_ROWS_SMALLER = {**_PRODUCT_OF_ODD_ROWS, 4: ProductTile(32, 64, 32, 8, 1)}
_SMALLER_ODD_ROWS = "sm_80", "sm_90", "sm_100", "sm_120"
# In the interpreter a column of a tile is summed row after row, not as a tree: short ones err as little as eager does.
_PRODUCT_OF_CPU = ProductTile(32, 128, 64, 4, 2)


class RowsTile(NamedTuple):
    """A program's tile of a matrix it reads once."""

    block_rows: int
    block_cols: int
    num_warps: int


# Eight elements a thread, in one row: compiled, unmeasured.
GELU_MLP_BWD_PRODUCT = RowsTile(16, 128, 8)
_ROW_PROGRAMS_PER_MULTIPROCESSOR = 4


def product_tile(element_size: int, architecture: str, describable: bool) -> ProductTile:
    """The tile of a fused product.

    element_size: bytes of the operands' dtype. describable: tensor descriptors can hold all of its matrices.
    """
    if architecture == "cpu":
        return _PRODUCT_OF_CPU
    if architecture == "sm_90" and element_size == 2 and describable:
        return _PRODUCT_DESCRIPTORS_HOPPER
    if describable:
        return _PRODUCT[element_size]
    is_smaller = architecture in _SMALLER_ODD_ROWS
    return (_PRODUCT_OF_ODD_ROWS_SMALLER if is_smaller else _PRODUCT_OF_ODD_ROWS)[element_size]


def gelu_mlp_row_programs(device: torch.device, n_row_tiles: int, n_col_tiles: int) -> int:
    """How many programs share the rows of a column tile: the number of partial sums of the bias gradient."""
    return min(n_row_tiles, -(-resident_programs(device, _ROW_PROGRAMS_PER_MULTIPROCESSOR) // n_col_tiles))


# --- persistent decode ----------------------------------------------------------------------------------------------


class PersistentRing(NamedTuple):
    """How one program fetches its weights: in tiles of 4 * groups rows, num_stages - 1 of them ahead."""

    groups: int
    num_warps: int
    num_stages: int


# 16 rows are what the tensor cores take. Up to 1024 channels they use 176 KiB of shared memory, above 224 of 227 KiB.
# Compiled without spills (triton 3.6 and 3.9), unmeasured.
_PERSISTENT_RING = PersistentRing(4, 8, 6)
_PERSISTENT_STAGES_ABOVE_1024_CHANNELS = 4
_PERSISTENT_ARCHITECTURES = "sm_90", "sm_100"
# So many keys are worth a program of their own, and so many programs a head: unmeasured. Every program adds up the
# splits of all heads, so that fewer are cheaper.
PERSISTENT_KEYS_PER_SPLIT, PERSISTENT_MAX_SPLITS = 64, 16
PERSISTENT_BLOCK_KEYS = 128
# In the interpreter few, which is quick, but enough to disagree.
_PERSISTENT_PROGRAMS_OF_CPU = 5


def persistent_ring(n_channels: int, dtype: torch.dtype, architecture: str) -> PersistentRing | None:
    """The ring of the persistent decode kernel, None where it does not run; float32 is for the interpreter."""
    on_gpu = architecture in _PERSISTENT_ARCHITECTURES and dtype in (torch.bfloat16, torch.float16)
    in_interpreter = architecture == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (on_gpu or in_interpreter):
        return None
    num_stages = _PERSISTENT_RING.num_stages if n_channels <= 1024 else _PERSISTENT_STAGES_ABOVE_1024_CHANNELS
    return _PERSISTENT_RING._replace(num_stages=num_stages)


def persistent_programs(device: torch.device) -> int:
    """How many programs of the persistent decode kernel are resident: one a multiprocessor."""
    name, n_multiprocessors = chip(device)
    return _PERSISTENT_PROGRAMS_OF_CPU if name == "cpu" else n_multiprocessors


# --- decode step ----------------------------------------------------------------------------------------------------

# More rows than these, or wider ones, go through torch's products: a program holds all rows of the stream, and passes
# over its weights once for each.
DECODE_MAX_ROWS, DECODE_MAX_CHANNELS = 4, 2048
# A program of the two products into the stream takes no more of their inner axis than this.
_DECODE_PART_COLS = 1024
# Programs that stream a matrix well, and slots that a program of attention reads at a time: unmeasured.
_DECODE_PROGRAMS, DECODE_BLOCK_KEYS, DECODE_ATTENTION_WARPS, DECODE_ATTENTION_STAGES = 128, 32, 4, 2
_DECODE_HEAD_PROGRAMS_PER_MULTIPROCESSOR = 2


class DecodeTile(NamedTuple):
    """What a program of a product takes: all rows, block_cols of the inner axis, block_out columns of the weights."""

    block_rows: int
    block_cols: int
    block_out: int
    num_warps: int
    num_stages: int


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def decode_tile(kernel: str, n_rows: int, n_cols: int, element_size: int, architecture: str) -> DecodeTile:
    """The tile of one of the kernels norm_product, project and head: compiled, unmeasured.

    n_cols: of the inner axis that a program takes. element_size: bytes of the weights' dtype.
    """
    block_rows, block_cols = _power_of_two(n_rows), _power_of_two(max(16, n_cols))
    is_wide = block_cols > 1024
    num_warps = min(4 * (2 if is_wide else 1) * (2 if n_rows > 1 else 1), 8 if kernel == "head" else 16)
    if architecture == "cpu":  # few programs, which take longer than their work
        return DecodeTile(block_rows, block_cols, 64, num_warps, 2)
    if kernel == "norm_product" and architecture in ("sm_80", "sm_86", "sm_89"):  # where 4 warps spill a word
        num_warps = max(num_warps, 8)
    # One sector of 32 bytes of every row of the weights. The head's rows are read whole.
    block_out = 32 // element_size if kernel != "head" or n_rows == 1 else 8
    return DecodeTile(block_rows, block_cols, block_out // 2 if is_wide and n_rows > 2 else block_out, num_warps, 2)


def decode_parts(n_cols: int, n_out: int) -> tuple[int, int]:
    """Into how many parts the inner axis of a product into the stream is split, and how many columns a part has."""
    n_tiles = -(-n_out // 16)
    n_parts = max(-(-n_cols // _DECODE_PART_COLS), min(-(-_DECODE_PROGRAMS // n_tiles), -(-n_cols // 128)))
    cols = -(-n_cols // n_parts)
    cols = -(-cols // 16) * 16
    return -(-n_cols // cols), cols


def decode_splits(n_row_heads: int, n_slots: int, architecture: str) -> int:
    """Programs that share the keys of one head of one row."""
    n_blocks = -(-n_slots // DECODE_BLOCK_KEYS)
    return max(1, min(3 if architecture == "cpu" else _DECODE_PROGRAMS // n_row_heads, n_blocks))


def decode_head_programs(device: torch.device) -> int:
    """Programs that share the tiles of the head."""
    return resident_programs(device, _DECODE_HEAD_PROGRAMS_PER_MULTIPROCESSOR)


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it runs: programmatic dependent launch, from Hopper on."""
    name = architecture(device)
    return name.startswith("sm_") and int(name[3:]) >= 90


# --- sampling -------------------------------------------------------------------------------------------------------

# Groups of 16 tokens that a program reduces, and its warps: 50 programs share a row of 50257 logits, with 8 logits a
# thread under way. Compiled without spills for every audited GPU, unmeasured.
SAMPLING_GROUPS, SAMPLING_GROUPS_WARPS = 64, 4
# Scores that the one program which chooses looks at together where nothing filters: compiled, unmeasured.
SAMPLING_CHOICE_BLOCK, SAMPLING_CHOICE_WARPS = 1024, 16
# Where a compiler (triton 3.6 to 3.9) spills a word of the block above: compiled, unmeasured.
_SAMPLING_CHOICE_BLOCK_ON = {"sm_90": 2048, "sm_100": 2048}


def sampling_choice_block(architecture: str) -> int:
    """Scores that the program which chooses a row's token looks at together."""
    return _SAMPLING_CHOICE_BLOCK_ON.get(architecture, SAMPLING_CHOICE_BLOCK)


# Lanes of the program that filters, each with a list of scores of its own: one a thread, which then reads what it wrote
# itself. With 16 warps it executes 1.3 (top-p) to 1.7 (top-k) times as many instructions, mostly in reductions across
# warps, and with 8 values of the threshold a round a few more too. Counted on sm_90, unmeasured.
SAMPLING_FILTER_LANES, SAMPLING_FILTER_WARPS, SAMPLING_WAYS = 256, 8, 4


def sampling_filter_registers(architecture: str) -> dict[str, int]:
    """The limit of registers a thread, as an option of the launch where the chip's compiler takes one.

    Unless told that it may use them, ptxas spills a few bytes of this kernel rather than use more than 64 registers,
    for the sake of programs that would share a multiprocessor: here there is one a row.
    """
    return {"maxnreg": 128} if architecture.startswith("sm_") else {}
