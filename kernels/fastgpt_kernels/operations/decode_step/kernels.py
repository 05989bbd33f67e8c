"""The kernels of one decode step: everything that GPT-2 does for the newest token of each of a few rows.

Each matrix is read once, by enough programs to use the memory's bandwidth. Every program repeats the little work on the
rows that its slice of the matrix needs: the norm, or merging the splits of attention. The residual stream stays in
float32. A product into the stream is split-K: it leaves partial sums, which the next kernels add in a fixed order.

With OVERLAP a kernel starts while the one before it still runs, loads its slice of the weights, and then waits.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton types compile-time parameters as constexpr, which no literal is, and its ranges as not iterable.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...common.arithmetic import LOG2_E, activation_and_derivative, rounded_product
from ..layer_norm.kernels import _normalise
from .row_products import _computed_once, _rows_times

# --- pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _await_previous_launch(OVERLAP: tl.constexpr):
    """Wait until the writes of the launch before are visible, and let the next launch begin."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _load_weight(
    weight_ptr, steps_ptr, scale_ptr, first, end, outs, in_out, n_cols, n_out,
    BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_COLS, outs) of a matrix (n_cols, n_out): its rows from `first` on, zero from `end` on.

    A matrix with a scale for each column is stored transposed: as int8 or, where it also has a step for every GROUP of
    values, as int4.
    """
    cols = first + tl.arange(0, BLOCK_COLS)
    if steps_ptr is not None:
        weight = tl.trans(
            _load_int4(weight_ptr, steps_ptr, first, end, outs, in_out, n_cols, BLOCK_COLS, GROUP, EVICTION)
        )
    else:
        if scale_ptr is None:
            offsets = cols.to(tl.int64)[:, None] * n_out + outs[None, :]
        else:
            offsets = cols[:, None] + outs.to(tl.int64)[None, :] * n_cols
        in_weight = (cols < end)[:, None] & in_out[None, :]
        weight = tl.load(weight_ptr + offsets, mask=in_weight, other=0.0, eviction_policy=EVICTION)
    return weight


@triton.jit
def _load_int4(
    values_ptr, steps_ptr, first, end, outs, in_out, n_cols,
    BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A tile (outs, BLOCK_COLS) of an `Int4Matrix`, transposed, as int8. first, end: multiples of GROUP.

    Each byte is loaded once. Its values meet the step of their group before they are told apart, as whole rows of
    bytes; interleaving the two halves then moves nothing between threads.
    """
    n_outs: tl.constexpr = outs.shape[0]
    n_groups: tl.constexpr = BLOCK_COLS // GROUP
    row = outs.to(tl.int64)[:, None]
    pairs = first // 2 + tl.arange(0, BLOCK_COLS // 2)
    groups = first // GROUP + tl.arange(0, n_groups)
    in_values = in_out[:, None] & (2 * pairs < end)[None, :]
    in_steps = in_out[:, None] & (groups * GROUP < end)[None, :]
    value_offsets = row * (n_cols // 2) + pairs[None, :]
    values = tl.load(values_ptr + value_offsets, mask=in_values, other=0, eviction_policy=EVICTION)
    steps = tl.load(steps_ptr + row * (n_cols // GROUP) + groups[None, :], mask=in_steps, other=0)

    in_groups = tl.reshape(values, (n_outs, n_groups, GROUP // 2))
    low = ((in_groups & 15).to(tl.int8) - 8) * steps[:, :, None]
    high = ((in_groups >> 4).to(tl.int8) - 8) * steps[:, :, None]
    return tl.reshape(tl.join(low, high), (n_outs, BLOCK_COLS))


@triton.jit
def _scaled(sums, scale_ptr, outs, in_out):
    """The sums (rows, outs) of a product, times the scale of each column if the matrix is int8 or int4."""
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + outs, mask=in_out, other=0.0)[None, :]
    return sums


@triton.jit
def _load_residual(
    stream_ptr, partial_ptr, bias_ptr, rows, cols, inside, n_rows, n_cols, N_PARTIALS: tl.constexpr
):  # fmt: skip
    """The stream (n_rows, n_cols) plus bias and the partial sums (N_PARTIALS, n_rows, n_cols) of the last product."""
    offsets = rows[:, None] * n_cols + cols[None, :]
    x = tl.load(stream_ptr + offsets, mask=inside, other=0.0)
    if N_PARTIALS > 0:
        x += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
        for part in tl.static_range(N_PARTIALS):
            x += tl.load(partial_ptr + part * n_rows * n_cols + offsets, mask=inside, other=0.0)
    return x


@triton.jit
def _attend_block(query, keys, values, is_seen, peak, total, mixed):
    """Online softmax over a block of keys (n, D): the new largest score, sum of weights and weighted sum of values.

    query: (D,), multiplied by the scale of the scores and log2(e). is_seen: (n,), true for at least one key.
    """
    products = rounded_product(keys.to(tl.float32), query[None, :])
    scores = tl.where(is_seen, tl.sum(products, axis=1), float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=0))
    weights = tl.exp2(scores - new_peak)
    rescale = tl.exp2(peak - new_peak)
    mixed = mixed * rescale + tl.sum(rounded_product(values.to(tl.float32), weights[:, None]), axis=0)
    return new_peak, total * rescale + tl.sum(weights, axis=0), mixed


@triton.jit
def _merge_splits(
    mixed_ptr, peak_ptr, total_ptr, rows, cols, inside, n_rows, n_cols, n_heads, head_dim, N_SPLITS: tl.constexpr
):  # fmt: skip
    """The output of attention from its splits. Every peak is finite, and split 0 has seen a key."""
    offsets = rows[:, None] * n_cols + cols[None, :]
    heads = rows[:, None] * n_heads + (cols // head_dim)[None, :]
    mixed = tl.load(mixed_ptr + offsets, mask=inside, other=0.0)
    peak = tl.load(peak_ptr + heads, mask=inside, other=0.0)
    total = tl.load(total_ptr + heads, mask=inside, other=1.0)
    for split in tl.static_range(1, N_SPLITS):
        split_mixed = tl.load(mixed_ptr + split * n_rows * n_cols + offsets, mask=inside, other=0.0)
        split_peak = tl.load(peak_ptr + split * n_rows * n_heads + heads, mask=inside, other=0.0)
        split_total = tl.load(total_ptr + split * n_rows * n_heads + heads, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        scale, split_scale = tl.exp2(peak - new_peak), tl.exp2(split_peak - new_peak)
        mixed = mixed * scale + split_mixed * split_scale
        total = total * scale + split_total * split_scale
        peak = new_peak
    return _computed_once(mixed / total)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _decode_embed_kernel(
    tokens_ptr, positions_ptr, wte_ptr, wpe_ptr, stream_ptr, n_tokens, n_positions, n_cols,
    BLOCK_COLS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program fills the stream (B, n_cols) of one row. Ids outside a table take its nearest row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_COLS)
    in_row = cols < n_cols
    _await_previous_launch(OVERLAP)

    token = tl.minimum(tl.maximum(tl.load(tokens_ptr + row), 0), n_tokens - 1)
    position = tl.minimum(tl.maximum(tl.load(positions_ptr + row), 0), n_positions - 1)
    x = tl.load(wte_ptr + token * n_cols + cols, mask=in_row, other=0.0).to(tl.float32)
    x += tl.load(wpe_ptr + position * n_cols + cols, mask=in_row, other=0.0).to(tl.float32)

    tl.store(stream_ptr + row * n_cols + cols, x, mask=in_row)


@triton.jit
def _decode_norm_product_kernel(
    stream_ptr, partial_ptr, partial_bias_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, steps_ptr, scale_ptr,
    bias_ptr, new_stream_ptr, y_ptr, n_rows, n_cols, n_out, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_OUT: tl.constexpr, N_PARTIALS: tl.constexpr,
    SLICES: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_OUT columns of act(layer_norm(stream) @ weight + bias) for all rows.

    weight: (n_cols, n_out), in floats, int8 or int4 (`_load_weight`). The first program also stores the stream with the
    partial sums added.
    """
    program = tl.program_id(0)
    rows, cols = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    outs = program * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    in_out = outs < n_out

    weight = _load_weight(
        weight_ptr, steps_ptr, scale_ptr, 0, n_cols, outs, in_out, n_cols, n_out, BLOCK_COLS, GROUP, "evict_first"
    )
    bias = tl.load(bias_ptr + outs, mask=in_out, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    _await_previous_launch(OVERLAP)

    x = _load_residual(stream_ptr, partial_ptr, partial_bias_ptr, rows, cols, inside, n_rows, n_cols, N_PARTIALS)
    if N_PARTIALS > 0 and program == 0:
        tl.store(new_stream_ptr + rows[:, None] * n_cols + cols[None, :], x, mask=inside)
    normalised, _ = _normalise(x, inside, n_cols, eps)
    normalised = normalised * norm_weight[None, :] + norm_bias[None, :]
    y = _scaled(_rows_times(normalised, weight, SLICES), scale_ptr, outs, in_out) + bias[None, :]
    if ACTIVATION != "none":
        y, _ = activation_and_derivative(y, ACTIVATION)

    in_y = (rows < n_rows)[:, None] & in_out[None, :]
    tl.store(y_ptr + rows[:, None] * n_out + outs[None, :], y.to(y_ptr.dtype.element_ty), mask=in_y)


@triton.jit
def _decode_head_kernel(
    stream_ptr, partial_ptr, partial_bias_ptr, norm_weight_ptr, norm_bias_ptr, head_ptr, steps_ptr, scale_ptr,
    logits_ptr, n_rows, n_cols, n_out, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_OUT: tl.constexpr, N_PARTIALS: tl.constexpr,
    SLICES: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program computes every n-th tile of layer_norm(stream) @ head^T for all rows.

    head: (n_out, n_cols), in floats, in int8 with a scale for each row, or in int4 with steps too.
    """
    rows, cols = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    norm_weight = tl.load(norm_weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    _await_previous_launch(OVERLAP)

    x = _load_residual(stream_ptr, partial_ptr, partial_bias_ptr, rows, cols, inside, n_rows, n_cols, N_PARTIALS)
    normalised, _ = _normalise(x, inside, n_cols, eps)
    normalised = normalised * norm_weight[None, :] + norm_bias[None, :]
    if BLOCK_ROWS <= 4:  # The parts of more rows do not stay in registers over the loop.
        normalised = _computed_once(normalised)

    for tile in tl.range(tl.program_id(0), tl.cdiv(n_out, BLOCK_OUT), tl.num_programs(0), num_stages=STAGES):
        outs = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        in_out = outs < n_out
        if steps_ptr is not None:
            head = _load_int4(head_ptr, steps_ptr, 0, n_cols, outs, in_out, n_cols, BLOCK_COLS, GROUP, "evict_first")
        else:
            head_offsets = outs.to(tl.int64)[:, None] * n_cols + cols[None, :]
            in_head = in_out[:, None] & (cols < n_cols)[None, :]
            head = tl.load(head_ptr + head_offsets, mask=in_head, other=0.0, eviction_policy="evict_first")
        logits = _scaled(_rows_times(normalised, head, SLICES, IS_TRANSPOSED=True), scale_ptr, outs, in_out)
        in_logits = (rows < n_rows)[:, None] & in_out[None, :]
        tl.store(logits_ptr + rows[:, None] * n_out + outs[None, :], logits, mask=in_logits)


@triton.jit
def _decode_attention_kernel(
    qkv_ptr, slots_ptr, starts_ptr, keys_ptr, values_ptr, mixed_ptr, peak_ptr, total_ptr,
    n_heads, n_slots, head_dim, scale,
    BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_NEW: tl.constexpr, N_SPLITS: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program attends to one split of the keys of one head of one row.

    qkv: (B, 3, H, D) of the newest tokens. Split 0 stores their keys and values in their slots of the caches
    (B, H, n_slots, D), if these exist, and reads new keys from qkv. A split is a whole number of blocks, so a short
    context fills only the first splits.
    BLOCK_NEW: 0 where every row has its own sequence. Otherwise the rows, at most BLOCK_NEW, are consecutive newest
    tokens of one sequence with one cache (H, n_slots, D), and each also sees those before it.
    With one split mixed (B, H, D) is the result; otherwise mixed (N_SPLITS, B, H, D) is not normalised and comes with
    peak and total (N_SPLITS, B, H).
    """
    split, row_head = tl.program_id(0) % N_SPLITS, tl.program_id(0) // N_SPLITS
    row, head = (row_head // n_heads).to(tl.int64), row_head % n_heads
    n_row_heads = tl.num_programs(0) // N_SPLITS
    dims = tl.arange(0, BLOCK_DIM)
    in_dim = dims < head_dim
    cache_base = (row_head if BLOCK_NEW == 0 else head).to(tl.int64) * n_slots * head_dim
    qkv_offsets = (row * 3 * n_heads + head) * head_dim + dims
    _await_previous_launch(OVERLAP)

    slot = tl.load(slots_ptr + row)
    start = tl.maximum(tl.load(starts_ptr + row), 0).to(tl.int32)
    query = tl.load(qkv_ptr + qkv_offsets, mask=in_dim, other=0.0).to(tl.float32) * (scale * LOG2_E)
    new_key = tl.load(qkv_ptr + qkv_offsets + n_heads * head_dim, mask=in_dim, other=0.0)
    new_value = tl.load(qkv_ptr + qkv_offsets + 2 * n_heads * head_dim, mask=in_dim, other=0.0)
    if split == 0:
        in_cache = dims < tl.where((slot >= 0) & (slot < n_slots), head_dim, 0)
        tl.store(keys_ptr + cache_base + slot * head_dim + dims, new_key, mask=in_cache)
        tl.store(values_ptr + cache_base + slot * head_dim + dims, new_value, mask=in_cache)

    if BLOCK_NEW == 0:
        cached_end = slot
        peak = tl.sum(rounded_product(query, new_key.to(tl.float32)), axis=0)
        total, mixed = 1.0, new_value.to(tl.float32)
    else:
        cached_end = tl.load(slots_ptr)
        siblings = tl.arange(0, BLOCK_NEW)
        is_seen = siblings <= row
        sibling_offsets = (siblings[:, None] * 3 * n_heads + n_heads + head) * head_dim + dims[None, :]
        in_block = is_seen[:, None] & in_dim[None, :]
        new_keys = tl.load(qkv_ptr + sibling_offsets, mask=in_block, other=0.0)
        new_values = tl.load(qkv_ptr + sibling_offsets + n_heads * head_dim, mask=in_block, other=0.0)
        peak, total, mixed = tl.full((), float("-inf"), tl.float32), 0.0, tl.zeros((BLOCK_DIM,), dtype=tl.float32)
        peak, total, mixed = _attend_block(query, new_keys, new_values, is_seen, peak, total, mixed)
    # New keys count in split 0 only. Other splits may start from their peak, because any finite peak cancels.
    total = tl.where(split == 0, total, 0.0)
    mixed = tl.where(split == 0, mixed, 0.0)
    end = tl.minimum(tl.maximum(cached_end, 0), n_slots).to(tl.int32)
    per_split = tl.cdiv(tl.cdiv(end - start, BLOCK_KEYS), N_SPLITS) * BLOCK_KEYS
    first = start + split * per_split
    last = tl.minimum(first + per_split, end)
    # A softmax for each position in a block, so that threads exchange nothing until the last block. Starting from the
    # finite peak, no position ever subtracts -inf from -inf.
    peaks = tl.zeros((BLOCK_KEYS,), dtype=tl.float32) + peak
    totals = tl.zeros((BLOCK_KEYS,), dtype=tl.float32)
    mixtures = tl.zeros((BLOCK_KEYS, BLOCK_DIM), dtype=tl.float32)
    for key_start in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
        key_slots = key_start + tl.arange(0, BLOCK_KEYS)
        in_split = key_slots < last
        in_tile = in_split[:, None] & in_dim[None, :]
        offsets = cache_base + key_slots[:, None] * head_dim + dims[None, :]
        keys = tl.load(keys_ptr + offsets, mask=in_tile, other=0.0)
        values = tl.load(values_ptr + offsets, mask=in_tile, other=0.0)
        products = rounded_product(keys.to(tl.float32), query[None, :])
        scores = tl.where(in_split, tl.sum(products, axis=1), float("-inf"))
        new_peaks = tl.maximum(peaks, scores)
        weights, rescale = tl.exp2(scores - new_peaks), tl.exp2(peaks - new_peaks)
        mixtures = mixtures * rescale[:, None] + values.to(tl.float32) * weights[:, None]
        peaks, totals = new_peaks, totals * rescale + weights

    last_peak = tl.max(peaks, axis=0)
    shares, rescale = tl.exp2(peaks - last_peak), tl.exp2(peak - last_peak)
    total = total * rescale + tl.sum(rounded_product(totals, shares), axis=0)
    mixed = mixed * rescale + tl.sum(rounded_product(mixtures, shares[:, None]), axis=0)
    peak = last_peak

    out_offsets = row_head.to(tl.int64) * head_dim + dims
    if N_SPLITS == 1:
        tl.store(mixed_ptr + out_offsets, (mixed / total).to(mixed_ptr.dtype.element_ty), mask=in_dim)
    else:
        tl.store(mixed_ptr + split * n_row_heads * head_dim + out_offsets, mixed, mask=in_dim)
        tl.store(peak_ptr + split * n_row_heads + row_head, peak)
        tl.store(total_ptr + split * n_row_heads + row_head, total)


@triton.jit
def _decode_project_kernel(
    x_ptr, peak_ptr, total_ptr, weight_ptr, steps_ptr, scale_ptr, partial_ptr,
    n_rows, n_cols, n_out, n_heads, head_dim, cols_per_part,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_OUT: tl.constexpr, N_SPLITS: tl.constexpr,
    SLICES: tl.constexpr, GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program multiplies one part of the columns of x (n_rows, n_cols) by BLOCK_OUT columns of weight.

    x: the output of attention in N_SPLITS splits, or a plain matrix if that is 1. weight: (n_cols, n_out), in floats,
    int8 or int4 (`_load_weight`). The sums of part p go to partial[p] (n_rows, n_out).
    """
    n_tiles = tl.cdiv(n_out, BLOCK_OUT)
    tile, part = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    rows, within = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    cols = part * cols_per_part + within
    outs = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_part, in_out = (within < cols_per_part) & (cols < n_cols), outs < n_out
    inside = (rows < n_rows)[:, None] & in_part[None, :]

    first = part * cols_per_part
    weight = _load_weight(
        weight_ptr, steps_ptr, scale_ptr, first, tl.minimum(first + cols_per_part, n_cols), outs, in_out, n_cols, n_out,
        BLOCK_COLS, GROUP, "evict_first",
    )  # fmt: skip
    _await_previous_launch(OVERLAP)

    if N_SPLITS > 1:
        x = _merge_splits(x_ptr, peak_ptr, total_ptr, rows, cols, inside, n_rows, n_cols, n_heads, head_dim, N_SPLITS)
    else:
        x = tl.load(x_ptr + rows[:, None] * n_cols + cols[None, :], mask=inside, other=0.0)
    sums = _scaled(_rows_times(x, weight, SLICES), scale_ptr, outs, in_out)

    in_sums = (rows < n_rows)[:, None] & in_out[None, :]
    sum_offsets = (part.to(tl.int64) * n_rows + rows[:, None]) * n_out + outs[None, :]
    tl.store(partial_ptr + sum_offsets, sums, mask=in_sums)
