"""Dropout inside a kernel: a function of only the seed and the position, so that backward draws the same bits."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton types compile-time parameters as constexpr, which no literal is, and triton 3.7 declares that some jit
# functions return None.

import triton
import triton.language as tl

from .dropout import PHILOX_ROUNDS

_PHILOX_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def dropout_keep(seed, batch_head, q_start, k_start, q_offset, k_offset, threshold):
    """Which weights survive, bit for bit as `dropout.dropout_keep_mask`.

    q_offset, k_offset: positions inside the block, (rows, 1) and (1, cols) or the other way round. q_start, k_start are
    multiples of 16. Kept apart from the starts, the offsets show the compiler which eight elements share a Philox call,
    and that one thread holds them.
    """
    q_group = (q_start >> 1) + (((q_offset >> 4) << 3) | (q_offset & 7))
    k_group = (k_start >> 2) + (((k_offset >> 4) << 2) | ((k_offset >> 1) & 3))
    zero = (q_offset | k_offset) * 0
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, zero + k_group, zero + q_group, zero + batch_head, zero, _PHILOX_ROUNDS
    )
    low_q, low_k = (q_offset & 8) == 0, (k_offset & 8) == 0
    word = tl.where(low_q, tl.where(low_k, word_0, word_1), tl.where(low_k, word_2, word_3))
    # An element draws a half of its word. Where it is the upper half, what lies below does not change the comparison.
    upper = word << (16 - (k_offset & 1) * 16).to(tl.uint32)
    return upper >= (tl.cast(threshold, tl.uint32) << 16)


@triton.jit
def dropped(weight, keep, keep_scale):
    """The weight where keep, else zero. keep_scale: a finite float.

    It is a zero that LLVM does not know. Behind a selection of a known one, LLVM rounds to half precision before it
    selects: two values that one instruction has rounded and packed are then taken apart, selected and packed again.
    """
    return tl.where(keep, weight, keep_scale - keep_scale)


@triton.jit
def dropout_scale(threshold, DTYPE: tl.constexpr):
    """The factor of surviving values, correctly rounded in DTYPE; a kernel argument would be float32."""
    n_kept = tl.cast(65536 - threshold, DTYPE)
    return 65536.0 / n_kept if n_kept.dtype == tl.float64 else tl.div_rn(65536.0, n_kept)
