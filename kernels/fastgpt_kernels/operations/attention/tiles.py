"""Launch configurations of attention, by head size, dtype and chip."""

from typing import NamedTuple


class AttentionTile(NamedTuple):
    """A program's tile of scores, in queries and keys."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# By kernel, bytes per element, and largest head size: compiled, not timed. float32 uses no tensor cores here unless it
# is rounded to tf32, so its accumulators limit the tile.
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
# Other GPUs have no wgmma: operands occupy registers, which leaves room for fewer scores. Compiled, not timed.
_ATTENTION_OFF_HOPPER = {
    ("fwd", 2, 128): AttentionTile(64, 32, 4, 2),
    ("dq", 2, 64): AttentionTile(64, 32, 4, 3),
    ("dq", 2, 128): AttentionTile(32, 32, 4, 2),
    ("dkdv", 2, 64): AttentionTile(32, 32, 4, 2),
    ("dkdv", 2, 128): AttentionTile(32, 32, 4, 2),
}
# With 8 warps and no dropout two programs are resident on a multiprocessor, as with 4 warps, and each key is read half
# as often: compiled for sm_90, not timed.
_ATTENTION_FWD_HOPPER = AttentionTile(128, 64, 8, 3)
# Without dropout 244 to 255 registers still leave two programs resident, and away from the diagonal a score takes 12.1
# instructions instead of 14.2 with 32 queries: counted in the machine code for sm_90, not timed.
_ATTENTION_DKDV_HOPPER = AttentionTile(64, 64, 4, 3)
# Replacements on GPUs where triton (3.6 to 3.9) spills a few bytes of the tiles above: compiled, not timed.
_ATTENTION_SM86 = {
    ("fwd", 4, 128): AttentionTile(16, 16, 4, 1),
    ("dq", 2, 128): AttentionTile(64, 32, 8, 2),
    ("dkdv", 4, 128): AttentionTile(16, 16, 8, 2),
}
_ATTENTION_ON = {
    "sm_80": {
        ("fwd", 4, 64): AttentionTile(64, 32, 8, 1),
        ("fwd", 4, 128): AttentionTile(16, 16, 4, 2),
        ("dq", 4, 64): AttentionTile(32, 16, 4, 2),
        ("dkdv", 4, 64): AttentionTile(16, 32, 8, 2),
        ("dkdv", 4, 128): AttentionTile(16, 32, 8, 1),
    },
    "sm_86": _ATTENTION_SM86,
    "sm_89": _ATTENTION_SM86,
    "sm_90": {("fwd", 4, 128): AttentionTile(16, 16, 4, 2), ("dkdv", 4, 128): AttentionTile(16, 16, 8, 2)},
    "sm_100": {
        # Tensor cores of this chip take 64 rows or more, and triton 3.6 and 3.7 then round float32 to tf32 unasked.
        ("fwd", 4, 64): AttentionTile(32, 32, 8, 2),
        ("fwd", 2, 128): AttentionTile(64, 32, 8, 2),
        ("fwd", 4, 128): AttentionTile(16, 16, 4, 2),
        ("dq", 2, 128): AttentionTile(32, 32, 8, 1),
        ("dkdv", 4, 128): AttentionTile(16, 16, 8, 1),
    },
    "sm_120": {
        ("fwd", 2, 128): AttentionTile(64, 32, 8, 2),
        ("dq", 2, 128): AttentionTile(32, 32, 8, 2),
        ("dq", 4, 64): AttentionTile(16, 32, 4, 2),
        ("dkdv", 2, 64): AttentionTile(32, 32, 8, 2),
    },
    "gfx942": {("dkdv", 2, 128): AttentionTile(16, 32, 4, 2)},
}
# Replacements where products of float32 are rounded to tf32, because triton (3.6 to 3.9) spills a few bytes of the
# tiles above: compiled, not timed.
_ATTENTION_TF32 = {
    ("fwd", 64): AttentionTile(64, 32, 8, 1),
    ("fwd", 128): AttentionTile(16, 16, 4, 1),
    ("dq", 64): AttentionTile(32, 32, 4, 2),
    ("dq", 128): AttentionTile(16, 16, 8, 2),
    ("dkdv", 64): AttentionTile(16, 32, 4, 2),
}
_ATTENTION_TF32_SM86 = {**_ATTENTION_TF32, ("fwd", 128): AttentionTile(32, 16, 4, 1)}
_ATTENTION_TF32_ON = {
    "sm_86": _ATTENTION_TF32_SM86,
    "sm_89": _ATTENTION_TF32_SM86,
    "sm_90": {
        ("fwd", 128): AttentionTile(64, 16, 4, 1),
        ("dq", 64): AttentionTile(32, 32, 4, 2),
        ("dq", 128): AttentionTile(16, 16, 8, 2),
        ("dkdv", 64): AttentionTile(32, 32, 4, 2),
        ("dkdv", 128): AttentionTile(16, 16, 4, 2),
    },
}


def attention_tile(
    kernel: str, head_dim: int, element_size: int, architecture: str, has_dropout: bool, precision: str
) -> AttentionTile:
    """The tile of a kernel, fwd, dq or dkdv.

    element_size: bytes of q's dtype. architecture: as returned by `chip.architecture`. precision: of products, as
    returned by `product_precision`.
    """
    padded_dim = 64 if head_dim <= 64 else 128
    if architecture == "cpu":
        # NumPy sums the products of small and large tiles in different orders, so the passes would disagree about a
        # score. On a GPU the order is that of the head's elements in every tile.
        return ATTENTION[kernel, 2, padded_dim]
    key = kernel, element_size, padded_dim
    if architecture == "sm_90" and not has_dropout and key == ("fwd", 2, 64):
        return _ATTENTION_FWD_HOPPER
    if architecture == "sm_90" and not has_dropout and key == ("dkdv", 2, 64):
        return _ATTENTION_DKDV_HOPPER
    tf32 = _ATTENTION_TF32_ON.get(architecture, _ATTENTION_TF32)
    if precision == "tf32" and (replacement := tf32.get((kernel, padded_dim))):
        return replacement
    off_hopper = {} if architecture == "sm_90" else _ATTENTION_OFF_HOPPER
    tile = _ATTENTION_ON.get(architecture, {}).get(key) or off_hopper.get(key) or ATTENTION[key]
    # A thread on AMD GPUs can use 512 registers only in programs of at most 4 warps.
    return tile._replace(num_warps=4) if architecture.startswith("gfx") else tile
