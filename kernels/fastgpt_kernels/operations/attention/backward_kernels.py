"""The backward kernels of causal_attention: separate passes for delta, dk and dv, and dq, without atomics.

Each recomputes the weights of its tiles from q, k and the statistics that forward stored: see `kernels.py`.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton types compile-time parameters as constexpr, which no literal is, and its ranges as not iterable.

import triton
import triton.language as tl

from ...common.arithmetic import rounded_product
from ...common.dropout_kernels import dropout_keep
from .kernels import VARYING, _exp, _load_rows, _locate, _locate_queries, _store_rows, _unmasked_keys


@triton.jit
def _weights(score, row_max, row_norm, score_scale, IS_WIDE: tl.constexpr):
    """The weights of attention, from q . k and the statistics of the rows."""
    if IS_WIDE:
        return _exp(score * score_scale - row_max, IS_WIDE) * row_norm
    else:
        return tl.exp2(score * score_scale - (row_max + row_norm))


@triton.jit(do_not_specialize=["n_batch_heads", "n_queries"])
def _causal_attention_bwd_delta_kernel(
    out_ptr, dout_ptr, delta_ptr,
    out_batch_stride, out_head_stride, out_token_stride, dout_batch_stride, dout_head_stride, dout_token_stride,
    n_batch_heads, n_heads, n_queries, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta (B, H, Tq) = rowsum(out * dout) / keep_scale, which equals rowsum(weight * dweight / keep_scale).

    The other kernels multiply by keep_scale at their end, which leaves it out of their loops.
    """
    batch_head, batch, head, block = _locate(n_batch_heads, n_heads)
    q_pos = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_in = q_pos < n_queries
    out_ptr += batch * out_batch_stride + head * out_head_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride

    out = _load_rows(out_ptr, q_pos, q_in, out_token_stride, HEAD_DIM, PADDED_DIM, True)
    dout = _load_rows(dout_ptr, q_pos, q_in, dout_token_stride, HEAD_DIM, PADDED_DIM, True)
    delta = tl.sum(rounded_product(out.to(tl.float32), dout.to(tl.float32)), axis=1)
    tl.store(delta_ptr + batch_head.to(tl.int64) * n_queries + q_pos, delta / keep_scale, mask=q_in)


# --- dk and dv ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["norm_ptr"])
def _causal_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, max_ptr, norm_ptr, delta_ptr, key_mask_ptr, seed_ptr, dk_ptr, dv_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, dout_batch_stride, dout_head_stride, dout_token_stride,
    n_batch_heads, n_heads, n_queries, n_keys, scale, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, N_PACKED: tl.constexpr,
):  # fmt: skip
    """One program computes dk and dv of one block of keys of one head. Blocks that the most queries see start first.

    Tiles of scores are (keys, queries), so that the products for dk and dv need not transpose them.
    """
    IS_WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth >= 32
    batch_head, batch, head, block = _locate(n_batch_heads, n_heads)
    k_start = block * BLOCK_K
    n_past = n_keys - n_queries
    q_offset, k_offset = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    k_pos = k_start + k_offset
    if HAS_KEY_MASK:
        key_mask_ptr += batch * n_keys
    k_in = _unmasked_keys(key_mask_ptr, k_pos, n_keys, HAS_KEY_MASK)
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

    # First the queries on the diagonal, then those that see every key of the block. With dropout the first loop covers
    # all, which saves registers.
    first = tl.maximum(k_start - n_past, 0) // BLOCK_Q * BLOCK_Q
    all_see = tl.cdiv(tl.maximum(k_start + BLOCK_K - 1 - n_past, 0), BLOCK_Q) * BLOCK_Q
    diagonal_stop = n_queries if HAS_DROPOUT else tl.minimum(all_see, n_queries)
    for SEES_ALL in tl.static_range(1 if HAS_DROPOUT else 2):
        for q_start in range(all_see if SEES_ALL else first, n_queries if SEES_ALL else diagonal_stop, BLOCK_Q):
            q_pos = q_start + q_offset
            q_in = q_pos < n_queries
            q = _load_rows(q_ptr, q_pos, q_in, q_token_stride, HEAD_DIM, PADDED_DIM, True)
            # Rows past the end add nothing, whatever their weights: their q, dout and delta are zero.
            row_max = tl.load(max_ptr + q_pos, mask=q_in, other=0.0)
            row_norm = tl.load(norm_ptr + q_pos, mask=q_in, other=0.0)
            dout = _load_rows(dout_ptr, q_pos, q_in, dout_token_stride, HEAD_DIM, PADDED_DIM, True)
            delta = tl.load(delta_ptr + q_pos, mask=q_in, other=0.0)

            score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            p = _weights(score, row_max[None, :], row_norm[None, :], score_scale, IS_WIDE)
            if not SEES_ALL:
                p = tl.where((q_pos + n_past)[None, :] >= k_pos[:, None], p, 0.0)
            if HAS_KEY_MASK:
                p = tl.where(k_in[:, None], p, 0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept = p
            if HAS_DROPOUT:
                keep = dropout_keep(seed, batch_head, q_start, k_start, q_offset[None, :], k_offset[:, None], threshold)
                kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp, 0.0)

            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=dv.dtype)
            dscore = p * (dp - delta[None, :])
            dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)

    n_row_heads = n_heads * N_PACKED  # in a row of the tensor that holds the gradient, and maybe two more
    start = (batch * n_keys * n_row_heads + head) * HEAD_DIM
    in_keys = k_pos < n_keys
    if HAS_DROPOUT:
        scale *= keep_scale
    _store_rows(dk_ptr + start, dk * scale, k_pos, in_keys, n_row_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)
    _store_rows(dv_ptr + start, dv * keep_scale, k_pos, in_keys, n_row_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)


# --- dq -------------------------------------------------------------------------------------------------------------


@triton.jit
def _recompute(
    q, dout, row_max, row_norm, k_ptr, v_ptr, key_mask_ptr, seed, batch_head, q_start, k_start,
    k_token_stride, v_token_stride, n_keys, n_past, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys, and for each query the weights of these keys and the gradients of the weights."""
    IS_WIDE: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth >= 32
    q_offset, k_offset = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    k_pos = k_start + k_offset
    k_in = _unmasked_keys(key_mask_ptr, k_pos, n_keys, HAS_KEY_MASK)
    k = _load_rows(k_ptr, k_pos, k_in, k_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL or HAS_KEY_MASK)
    v = _load_rows(v_ptr, k_pos, k_in, v_token_stride, HEAD_DIM, PADDED_DIM, IS_DIAGONAL or HAS_KEY_MASK)

    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = _weights(score, row_max[:, None], row_norm[:, None], score_scale, IS_WIDE)
    if IS_DIAGONAL:
        p = tl.where((q_start + q_offset + n_past)[:, None] >= k_pos[None, :], p, 0.0)
    if HAS_KEY_MASK:
        p = tl.where(k_in[None, :], p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = dropout_keep(seed, batch_head, q_start, k_start, q_offset[:, None], k_offset[None, :], threshold)
        dp = tl.where(keep, dp, 0.0)
    return k, p, dp


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["norm_ptr"])
def _causal_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, max_ptr, norm_ptr, delta_ptr, key_mask_ptr, seed_ptr, dq_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, dout_batch_stride, dout_head_stride, dout_token_stride,
    n_batch_heads, n_heads, n_queries, n_keys, scale, score_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, N_PACKED: tl.constexpr,
):  # fmt: skip
    """One program computes dq of one block of queries of one head; in float32 also delta."""
    batch_head, batch, head, block = _locate(n_batch_heads, n_heads)
    q_start, diagonal, stop = _locate_queries(block, n_queries, n_keys, BLOCK_Q, BLOCK_K)
    q_pos = q_start + tl.arange(0, BLOCK_Q)
    q_in = q_pos < n_queries
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride
    if HAS_KEY_MASK:
        key_mask_ptr += batch * n_keys
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    q = _load_rows(q_ptr, q_pos, q_in, q_token_stride, HEAD_DIM, PADDED_DIM, True)
    dout = _load_rows(dout_ptr, q_pos, q_in, dout_token_stride, HEAD_DIM, PADDED_DIM, True)
    row = batch_head.to(tl.int64) * n_queries + q_pos
    row_max = tl.load(max_ptr + row, mask=q_in, other=0.0)
    row_norm = tl.load(norm_ptr + row, mask=q_in, other=0.0)
    dq = tl.zeros((BLOCK_Q, PADDED_DIM), max_ptr.dtype.element_ty)

    # In float32 a first pass over all keys sums delta from the same p * dp that dscore uses: both round alike, so their
    # difference stays small. Then come the keys that every query of the block sees, and last those on the diagonal.
    SUMS_DELTA: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth >= 32
    if SUMS_DELTA:
        delta = tl.zeros((BLOCK_Q,), max_ptr.dtype.element_ty)
    else:
        delta = tl.load(delta_ptr + row, mask=q_in, other=0.0)
    for PASS in tl.static_range(0 if SUMS_DELTA else 1, 3):
        for k_start in range(diagonal if PASS == 2 else 0, diagonal if PASS == 1 else stop, BLOCK_K):
            k, p, dp = _recompute(
                q, dout, row_max, row_norm, k_ptr, v_ptr, key_mask_ptr, seed,
                batch_head=batch_head, q_start=q_start, k_start=k_start,
                k_token_stride=k_token_stride, v_token_stride=v_token_stride, n_keys=n_keys, n_past=n_keys - n_queries,
                score_scale=score_scale, threshold=threshold, keep_scale=keep_scale,
                HEAD_DIM=HEAD_DIM, PADDED_DIM=PADDED_DIM, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K,
                IS_DIAGONAL=PASS != 1, HAS_KEY_MASK=HAS_KEY_MASK, HAS_DROPOUT=HAS_DROPOUT, PRECISION=PRECISION,
            )  # fmt: skip
            if PASS == 0:
                delta += tl.sum(rounded_product(p, dp), axis=1)
            else:
                dscore = p * (dp - delta[:, None])
                dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)
        if PASS == 0:
            tl.store(delta_ptr + row, delta, mask=q_in)

    n_row_heads = n_heads * N_PACKED
    dq_ptr += (batch * n_queries * n_row_heads + head) * HEAD_DIM
    if HAS_DROPOUT:
        scale *= keep_scale
    _store_rows(dq_ptr, dq * scale, q_pos, q_in, n_row_heads * HEAD_DIM, HEAD_DIM, PADDED_DIM)
