"""The forward kernel of causal_attention, and the pieces that the backward kernels share with it.

A program holds one block of queries (or, for dk and dv, of keys) of one head and loops over the other axis. Scores
become weights by exp2. In half precision log2(e) is folded into `score_scale`, so that scores are in units of log2, and
for each query forward stores the largest score and the log2 of the sum of exponentials. Added up they are the
log-sum-exp, from which the backward passes recompute the weights. In float32 the rounding of that scale and of that sum
would show, so scores stay in natural units, and forward stores the inverse of the sum of exponentials. Sums have the
dtype of these statistics: float32, or float64 for float64 inputs, which the gradient tests use.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton types compile-time parameters as constexpr, which no literal is, and its ranges as not iterable.

import triton
import triton.language as tl

from ...common.arithmetic import LOG2_E
from ...common.dropout_kernels import dropout_keep, dropped

# These vary from call to call, and triton would compile the kernel again for special values of them. The alignment of
# norm_ptr, the second half of the statistics, varies too.
VARYING = ["n_batch_heads", "n_queries", "n_keys", "threshold"]

# --- pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _locate(n_batch_heads, n_heads):
    """This program's head, as one number and as (batch, head), and its block. Block 0 of every head starts first."""
    batch_head, block = tl.program_id(0) % n_batch_heads, tl.program_id(0) // n_batch_heads
    return batch_head, (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64), block


@triton.jit
def _locate_queries(block, n_queries, n_keys, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(q_start, diagonal, stop) of a block of queries: it starts at q_start, and none of it sees a key from stop on.

    All of its queries see every block of keys that ends by diagonal. Block 0 holds the last queries, which see the most
    keys, so that the longest programs start first.
    """
    q_start = (tl.cdiv(n_queries, BLOCK_Q) - 1 - block) * BLOCK_Q
    n_past = n_keys - n_queries
    diagonal = (q_start + n_past + 1) // BLOCK_K * BLOCK_K
    return q_start, diagonal, tl.minimum(q_start + n_past + BLOCK_Q, n_keys)


@triton.jit
def _unmasked_keys(key_mask_ptr, k_pos, n_keys, HAS_KEY_MASK: tl.constexpr):
    """Which keys exist and are not hidden by the padding mask."""
    k_in = k_pos < n_keys
    return tl.load(key_mask_ptr + k_pos, mask=k_in, other=0) != 0 if HAS_KEY_MASK else k_in


@triton.jit
def _load_rows(
    ptr, rows, row_in, token_stride, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """A (rows, PADDED_DIM) block, zero past HEAD_DIM and in masked rows. Loads have no mask where none is needed."""
    dims = tl.arange(0, PADDED_DIM)
    ptrs = ptr + rows.to(tl.int64)[:, None] * token_stride + dims[None, :]
    if MASK_ROWS and HEAD_DIM < PADDED_DIM:
        return tl.load(ptrs, mask=row_in[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=row_in[:, None], other=0.0)
    elif HEAD_DIM < PADDED_DIM:
        return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_rows(ptr, value, rows, row_in, token_stride, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    dims = tl.arange(0, PADDED_DIM)
    ptrs = ptr + rows.to(tl.int64)[:, None] * token_stride + dims[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=row_in[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _exp(x, IS_WIDE: tl.constexpr):
    """exp of x, a score minus its row's largest: in natural units if IS_WIDE (32 bits or more), else in log2 units."""
    return tl.exp2(x * LOG2_E if IS_WIDE else x)


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["norm_ptr"])
def _causal_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, max_ptr, norm_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride,
    n_batch_heads, n_heads, n_queries, n_keys, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes one block of queries of one head, by an online softmax over blocks of keys."""
    IS_WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth >= 32
    batch_head, batch, head, block = _locate(n_batch_heads, n_heads)
    q_start, diagonal, stop = _locate_queries(block, n_queries, n_keys, BLOCK_Q, BLOCK_K)
    q_offset, k_offset = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_pos = q_start + q_offset
    q_in = q_pos < n_queries
    last_key = q_pos + (n_keys - n_queries)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    if HAS_KEY_MASK:
        key_mask_ptr += batch * n_keys
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    q = _load_rows(q_ptr, q_pos, q_in, q_token_stride, HEAD_DIM, PADDED_DIM, True)
    acc = tl.zeros((BLOCK_Q, PADDED_DIM), max_ptr.dtype.element_ty)
    row_max = tl.full((BLOCK_Q,), -float("inf"), max_ptr.dtype.element_ty)
    row_sum = tl.zeros((BLOCK_Q,), max_ptr.dtype.element_ty)

    # First the keys that every query of the block sees, then those on the diagonal.
    for IS_DIAGONAL in tl.static_range(2):
        for k_start in range(diagonal if IS_DIAGONAL else 0, stop if IS_DIAGONAL else diagonal, BLOCK_K):
            k_pos = k_start + k_offset
            k_in = _unmasked_keys(key_mask_ptr, k_pos, n_keys, HAS_KEY_MASK)
            k = _load_rows(k_ptr, k_pos, k_in, k_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL)

            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if IS_DIAGONAL:
                score = tl.where(last_key[:, None] >= k_pos[None, :], score, -float("inf"))
            if HAS_KEY_MASK:
                score = tl.where(k_in[None, :], score, -float("inf"))

            new_max = tl.maximum(row_max, tl.max(score, axis=1) * score_scale)
            # A row that has seen no key yet subtracts 0, because -inf - -inf is NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max) if HAS_KEY_MASK else new_max
            p = _exp(score * score_scale - shift[:, None], IS_WIDE)
            shrink = _exp(row_max - shift, IS_WIDE)
            row_sum = row_sum * shrink + tl.sum(p, axis=1)
            row_max = new_max
            if HAS_DROPOUT:
                keep = dropout_keep(seed, batch_head, q_start, k_start, q_offset[:, None], k_offset[None, :], threshold)
                p = dropped(p, keep, keep_scale)

            # Load masked values as zero: a weight of zero times NaN or Inf would be NaN.
            v = _load_rows(v_ptr, k_pos, k_in, v_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL or HAS_KEY_MASK)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=acc.dtype)

    if HAS_KEY_MASK:
        # A row that sees no key gives zeros; backward masks its weights like those of any hidden key.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    row_norm = 1.0 / row_sum if IS_WIDE else tl.log2(row_sum)
    out_ptr += (batch * n_queries * n_heads + head) * HEAD_DIM
    _store_rows(out_ptr, acc * (keep_scale / row_sum)[:, None], q_pos, q_in, n_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)
    row = batch_head.to(tl.int64) * n_queries + q_pos
    tl.store(max_ptr + row, row_max, mask=q_in)
    tl.store(norm_ptr + row, row_norm, mask=q_in)
