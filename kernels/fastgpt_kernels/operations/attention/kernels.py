"""The kernels of causal_attention: one forward pass, and three backward passes without atomics.

A program holds one block of queries (or, for dk and dv, of keys) of one head and loops over the other axis. Scores
become weights by exp2: in half precision log2(e) is folded into `score_scale`, so that scores are in units of log2. For
each query forward stores the largest score and the log2 of the sum of exponentials. Together they are the log-sum-exp,
from which the backward passes recompute the weights. In float32, where the rounding of both would show, scores stay in
natural units and the inverse of the sum is stored. Sums have the dtype of these statistics: float32, or float64 for
float64 inputs, which the gradient tests use.
"""

# pyright: reportArgumentType=false
# Triton types compile-time parameters as constexpr, which no literal is.

import triton
import triton.language as tl

from ...common.arithmetic import LOG2_E, rounded_product
from ...common.dropout_kernels import dropout_keep

# Arguments that vary from call to call. The alignment of norm_ptr, the second half of the statistics, varies too.
_VARYING = ["n_batch_heads", "n_queries", "n_keys", "threshold"]

# --- pieces ---------------------------------------------------------------------------------------------------------


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
    """exp of x, a score minus its row's largest: in natural units in wide dtypes, otherwise in units of log2."""
    return tl.exp2(x * LOG2_E if IS_WIDE else x)


@triton.jit
def _weights(score, row_max, row_norm, score_scale, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        return _exp(score * score_scale - row_max, IS_WIDE) * row_norm
    else:
        return tl.exp2(score * score_scale - (row_max + row_norm))


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, first, stop,
    k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [first, stop) for one block of queries."""
    IS_WIDE: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth >= 32
    q_offset, k_offset = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    last_key = q_start + q_offset + n_past
    for k_start in range(first, stop, BLOCK_K):
        k_pos = k_start + k_offset
        k_in = k_pos < n_keys
        if HAS_KEY_MASK:
            k_in = tl.load(key_mask_ptr + k_pos, mask=k_in, other=0) != 0
        k = _load_rows(k_ptr, k_pos, k_in, k_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL)

        score = tl.dot(q, tl.trans(k), input_precision="ieee")
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
            p = tl.where(keep, p, 0.0)

        # Load masked values as zero: a weight of zero times NaN or Inf would be NaN.
        v = _load_rows(v_ptr, k_pos, k_in, v_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL or HAS_KEY_MASK)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=acc.dtype)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["norm_ptr"])
def _causal_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, max_ptr, norm_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride,
    n_batch_heads, n_heads, n_queries, n_keys, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program computes one block of queries of one head. The last blocks, which see the most keys, start first."""
    batch_head = tl.program_id(0) % n_batch_heads
    q_start = (tl.cdiv(n_queries, BLOCK_Q) - 1 - tl.program_id(0) // n_batch_heads) * BLOCK_Q
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    n_past = n_keys - n_queries
    q_pos = q_start + tl.arange(0, BLOCK_Q)
    q_in = q_pos < n_queries
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    if HAS_KEY_MASK:
        key_mask_ptr += batch * n_keys
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    q_ptr += batch * q_batch_stride + head * q_head_stride
    q = _load_rows(q_ptr, q_pos, q_in, q_token_stride, HEAD_DIM, PADDED_DIM, True)
    acc = tl.zeros((BLOCK_Q, PADDED_DIM), max_ptr.dtype.element_ty)
    row_max = tl.full((BLOCK_Q,), -float("inf"), max_ptr.dtype.element_ty)
    row_sum = tl.zeros((BLOCK_Q,), max_ptr.dtype.element_ty)

    # First the keys that every query of the block sees, then those on the diagonal.
    diagonal = (q_start + n_past + 1) // BLOCK_K * BLOCK_K
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, 0, diagonal,
        k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold,
        HEAD_DIM, PADDED_DIM, BLOCK_Q, BLOCK_K, False, HAS_KEY_MASK, HAS_DROPOUT,
    )  # fmt: skip
    stop = tl.minimum(q_start + n_past + BLOCK_Q, n_keys)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, diagonal, stop,
        k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold,
        HEAD_DIM, PADDED_DIM, BLOCK_Q, BLOCK_K, True, HAS_KEY_MASK, HAS_DROPOUT,
    )  # fmt: skip

    if HAS_KEY_MASK:
        # A row that sees no key gives zeros; backward masks its weights like those of any hidden key.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    row_norm = 1.0 / row_sum if q_ptr.dtype.element_ty.primitive_bitwidth >= 32 else tl.log2(row_sum)
    out_ptr += (batch * n_queries * n_heads + head) * HEAD_DIM
    _store_rows(out_ptr, acc * (keep_scale / row_sum)[:, None], q_pos, q_in, n_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)
    row = batch_head.to(tl.int64) * n_queries + q_pos
    tl.store(max_ptr + row, row_max, mask=q_in)
    tl.store(norm_ptr + row, row_norm, mask=q_in)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_batch_heads", "n_queries"])
def _causal_attention_bwd_delta_kernel(
    out_ptr, dout_ptr, delta_ptr,
    out_batch_stride, out_head_stride, out_token_stride, dout_batch_stride, dout_head_stride, dout_token_stride,
    n_batch_heads, n_heads, n_queries,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta (B, H, Tq) = rowsum(out * dout), which equals rowsum(weight * dweight), with or without dropout."""
    batch_head = tl.program_id(0) % n_batch_heads
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    q_pos = tl.program_id(0) // n_batch_heads * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_in = q_pos < n_queries
    out_ptr += batch * out_batch_stride + head * out_head_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride

    out = _load_rows(out_ptr, q_pos, q_in, out_token_stride, HEAD_DIM, PADDED_DIM, True)
    dout = _load_rows(dout_ptr, q_pos, q_in, dout_token_stride, HEAD_DIM, PADDED_DIM, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    tl.store(delta_ptr + batch_head.to(tl.int64) * n_queries + q_pos, delta, mask=q_in)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, k_in, q_ptr, dout_ptr, max_ptr, norm_ptr, delta_ptr, seed, batch_head, k_start, first, stop,
    q_token_stride, dout_token_stride, n_queries, n_past, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add the terms of queries [first, stop). Tiles are (keys, queries), so that no product transposes one."""
    IS_WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth >= 32
    q_offset, k_offset = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    for q_start in range(first, stop, BLOCK_Q):
        q_pos = q_start + q_offset
        q_in = q_pos < n_queries
        q = _load_rows(q_ptr, q_pos, q_in, q_token_stride, HEAD_DIM, PADDED_DIM, True)
        # Rows past the end add nothing, whatever their weights: their q, dout and delta are zero.
        row_max = tl.load(max_ptr + q_pos, mask=q_in, other=0.0)
        row_norm = tl.load(norm_ptr + q_pos, mask=q_in, other=0.0)
        dout = _load_rows(dout_ptr, q_pos, q_in, dout_token_stride, HEAD_DIM, PADDED_DIM, True)
        delta = tl.load(delta_ptr + q_pos, mask=q_in, other=0.0)

        score = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = _weights(score, row_max[None, :], row_norm[None, :], score_scale, IS_WIDE)
        if IS_DIAGONAL:
            p = tl.where((q_pos + n_past)[None, :] >= (k_start + k_offset)[:, None], p, 0.0)
        if HAS_KEY_MASK:
            p = tl.where(k_in[:, None], p, 0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        kept = p
        if HAS_DROPOUT:
            keep = dropout_keep(seed, batch_head, q_start, k_start, q_offset[None, :], k_offset[:, None], threshold)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)

        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision="ieee", out_dtype=dv.dtype)
        dscore = p * (dp - delta[None, :])
        dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision="ieee", out_dtype=dk.dtype)
    return dk, dv


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["norm_ptr"])
def _causal_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, max_ptr, norm_ptr, delta_ptr, key_mask_ptr, seed_ptr, dk_ptr, dv_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, dout_batch_stride, dout_head_stride, dout_token_stride,
    n_batch_heads, n_heads, n_queries, n_keys, scale, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program computes dk and dv of one block of keys of one head. The first, with most queries, start first."""
    batch_head = tl.program_id(0) % n_batch_heads
    k_start = tl.program_id(0) // n_batch_heads * BLOCK_K
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    n_past = n_keys - n_queries
    k_pos = k_start + tl.arange(0, BLOCK_K)
    in_keys = k_pos < n_keys
    k_in = in_keys
    if HAS_KEY_MASK:
        k_in = tl.load(key_mask_ptr + batch * n_keys + k_pos, mask=in_keys, other=0) != 0
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    q_ptr += batch * q_batch_stride + head * q_head_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride
    row_start = batch_head.to(tl.int64) * n_queries
    max_ptr += row_start
    norm_ptr += row_start
    delta_ptr += row_start

    # Masked keys and values are loaded as zero, so that NaN or Inf in them does not spread.
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    k = _load_rows(k_ptr, k_pos, k_in, k_token_stride, HEAD_DIM, PADDED_DIM, True)
    v = _load_rows(v_ptr, k_pos, k_in, v_token_stride, HEAD_DIM, PADDED_DIM, True)
    dk = tl.zeros((BLOCK_K, PADDED_DIM), max_ptr.dtype.element_ty)
    dv = tl.zeros((BLOCK_K, PADDED_DIM), max_ptr.dtype.element_ty)

    first = tl.maximum(k_start - n_past, 0) // BLOCK_Q * BLOCK_Q
    all_see = tl.cdiv(tl.maximum(k_start + BLOCK_K - 1 - n_past, 0), BLOCK_Q) * BLOCK_Q
    # With dropout one loop covers all queries, which saves registers.
    diagonal_stop = n_queries if HAS_DROPOUT else tl.minimum(all_see, n_queries)
    dk, dv = _accumulate_dkdv(
        dk, dv, k, v, k_in, q_ptr, dout_ptr, max_ptr, norm_ptr, delta_ptr, seed, batch_head, k_start,
        first, diagonal_stop, q_token_stride, dout_token_stride, n_queries, n_past, score_scale, threshold, keep_scale,
        HEAD_DIM, PADDED_DIM, BLOCK_Q, BLOCK_K, True, HAS_KEY_MASK, HAS_DROPOUT,
    )  # fmt: skip
    if not HAS_DROPOUT:
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, k_in, q_ptr, dout_ptr, max_ptr, norm_ptr, delta_ptr, seed, batch_head, k_start,
            all_see, n_queries, q_token_stride, dout_token_stride, n_queries, n_past, score_scale, threshold,
            keep_scale, HEAD_DIM, PADDED_DIM, BLOCK_Q, BLOCK_K, False, HAS_KEY_MASK, HAS_DROPOUT,
        )  # fmt: skip

    start = (batch * n_keys * n_heads + head) * HEAD_DIM
    _store_rows(dk_ptr + start, dk * scale, k_pos, in_keys, n_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)
    _store_rows(dv_ptr + start, dv * keep_scale, k_pos, in_keys, n_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)


@triton.jit
def _walk_keys(
    dq, delta, q, dout, row_max, row_norm, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, first, stop,
    k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, SUM_DELTA: tl.constexpr,
):  # fmt: skip
    """Add the terms of keys [first, stop) to dq, or with SUM_DELTA to delta = rowsum(weight * dweight)."""
    IS_WIDE: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth >= 32
    q_offset, k_offset = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    last_key = q_start + q_offset + n_past
    for k_start in range(first, stop, BLOCK_K):
        k_pos = k_start + k_offset
        k_in = k_pos < n_keys
        if HAS_KEY_MASK:
            k_in = tl.load(key_mask_ptr + k_pos, mask=k_in, other=0) != 0
        k = _load_rows(k_ptr, k_pos, k_in, k_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL or HAS_KEY_MASK)
        v = _load_rows(v_ptr, k_pos, k_in, v_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL or HAS_KEY_MASK)

        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = _weights(score, row_max[:, None], row_norm[:, None], score_scale, IS_WIDE)
        if IS_DIAGONAL:
            p = tl.where(last_key[:, None] >= k_pos[None, :], p, 0.0)
        if HAS_KEY_MASK:
            p = tl.where(k_in[None, :], p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if HAS_DROPOUT:
            keep = dropout_keep(seed, batch_head, q_start, k_start, q_offset[:, None], k_offset[None, :], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)

        if SUM_DELTA:
            delta += tl.sum(rounded_product(p, dp), axis=1)
        else:
            dscore = p * (dp - delta[:, None])
            dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision="ieee", out_dtype=dq.dtype)
    return dq, delta


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["norm_ptr"])
def _causal_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, max_ptr, norm_ptr, delta_ptr, key_mask_ptr, seed_ptr, dq_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, dout_batch_stride, dout_head_stride, dout_token_stride,
    n_batch_heads, n_heads, n_queries, n_keys, scale, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program computes dq of one block of queries of one head, the last blocks first; in float32 also delta."""
    batch_head = tl.program_id(0) % n_batch_heads
    q_start = (tl.cdiv(n_queries, BLOCK_Q) - 1 - tl.program_id(0) // n_batch_heads) * BLOCK_Q
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    n_past = n_keys - n_queries
    q_pos = q_start + tl.arange(0, BLOCK_Q)
    q_in = q_pos < n_queries
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    if HAS_KEY_MASK:
        key_mask_ptr += batch * n_keys
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    q_ptr += batch * q_batch_stride + head * q_head_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride
    q = _load_rows(q_ptr, q_pos, q_in, q_token_stride, HEAD_DIM, PADDED_DIM, True)
    dout = _load_rows(dout_ptr, q_pos, q_in, dout_token_stride, HEAD_DIM, PADDED_DIM, True)
    row = batch_head.to(tl.int64) * n_queries + q_pos
    row_max = tl.load(max_ptr + row, mask=q_in, other=0.0)
    row_norm = tl.load(norm_ptr + row, mask=q_in, other=0.0)
    dq = tl.zeros((BLOCK_Q, PADDED_DIM), max_ptr.dtype.element_ty)
    diagonal = (q_start + n_past + 1) // BLOCK_K * BLOCK_K
    stop = tl.minimum(q_start + n_past + BLOCK_Q, n_keys)

    if q_ptr.dtype.element_ty.primitive_bitwidth >= 32:
        # Sum delta from the same p * dp that ds uses: both round alike, so their difference stays small.
        delta = tl.zeros((BLOCK_Q,), max_ptr.dtype.element_ty)
        dq, delta = _walk_keys(
            dq, delta, q, dout, row_max, row_norm, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, 0, stop,
            k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold, keep_scale,
            HEAD_DIM, PADDED_DIM, BLOCK_Q, BLOCK_K, True, HAS_KEY_MASK, HAS_DROPOUT, True,
        )  # fmt: skip
        tl.store(delta_ptr + row, delta, mask=q_in)
    else:
        delta = tl.load(delta_ptr + row, mask=q_in, other=0.0)
    dq, delta = _walk_keys(
        dq, delta, q, dout, row_max, row_norm, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, 0, diagonal,
        k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold, keep_scale,
        HEAD_DIM, PADDED_DIM, BLOCK_Q, BLOCK_K, False, HAS_KEY_MASK, HAS_DROPOUT, False,
    )  # fmt: skip
    dq, delta = _walk_keys(
        dq, delta, q, dout, row_max, row_norm, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, diagonal, stop,
        k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold, keep_scale,
        HEAD_DIM, PADDED_DIM, BLOCK_Q, BLOCK_K, True, HAS_KEY_MASK, HAS_DROPOUT, False,
    )  # fmt: skip
    dq_ptr += (batch * n_queries * n_heads + head) * HEAD_DIM
    _store_rows(dq_ptr, dq * scale, q_pos, q_in, n_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)
