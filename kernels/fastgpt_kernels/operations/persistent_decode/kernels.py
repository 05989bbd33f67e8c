"""One kernel for the whole decode step of one row.

All programs stay resident, one on each multiprocessor, and meet at grid barriers, five per layer:

    1  LN1 + QKV, keys and values to the cache        4  LN2 + FC + activation
    2  attention, keys split among the programs       5  projection of the MLP + residual
    3  sum of the splits, projection + residual       after the last layer: LN + head

Every program owns a slice of the outputs of each phase. The weights of its slices are stored in the order in which it
uses them, in tiles of one size, followed by its rows of the head. One loop walks this stream. The address of a tile
depends only on the loop's counter, so the compiler prefetches tiles into a ring of buffers in shared memory while
earlier phases still compute or wait.
"""

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from ...common.arithmetic import LOG2_E, activation_and_derivative, rounded_product
from ...common.launch import cdiv
from . import tiles

# Below every score, but finite, so that the difference of two of them is zero and not NaN.
_LOWEST = tl.constexpr(-3.4e38)
HEAD_DIM = tl.constexpr(64)
# Parts of a row: each of 8 warps multiplies one of them, and their sums are added at the end.
_PARTS = tl.constexpr(8)


@triton.jit(noinline=True)
def _arrive(counter_ptr):
    """Count this program as arrived. Not inlined, because `debug_barrier` in the loop's body would stop the prefetch.

    It must not use shared memory: triton 3.6 places the shared memory of functions that are not inlined over the ring.
    """
    # All threads must have stored before one of them releases.
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _grid_barrier(counter_ptr, target):
    """Wait until the counter, which is never reset, shows that every program has arrived."""
    _arrive(counter_ptr)
    # One thread polls and broadcasts the value, so that the loads of the others come after its acquire.
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def _channels(BLOCK_C: tl.constexpr):
    """0 .. BLOCK_C - 1 as (parts, BLOCK_C / parts), the shape of every row in this kernel."""
    return tl.arange(0, _PARTS)[:, None] * (BLOCK_C // _PARTS) + tl.arange(0, BLOCK_C // _PARTS)[None, :]


@triton.jit
def _norm(x, weight, bias, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The norm of a row of C channels.

    It omits the second centring of `layer_norm`, because all programs would wait for it twice per layer.
    """
    centered = tl.where(_channels(BLOCK_C) < C, x - tl.sum(x) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(rounded_product(centered, centered)) / C + eps)
    return centered * rstd * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """Float32 columns x (parts, K, 1 or 8) as the operand (parts, K, 8) in dtype that tensor cores multiply by a tile.

    Columns 2q and 2q + 1 serve the weight rows of quarter q, which may have its own x. Column 2q is x rounded to dtype,
    column 2q + 1 the rounding error: together they have twice the bits of dtype.
    """
    is_rounded = tl.arange(0, 8)[None, None, :] % 2 == 0
    rounded = x.to(dtype)
    rest = (x - rounded.to(tl.float32)).to(dtype)
    return tl.where(is_rounded, rounded, rest)


@triton.jit
def _norm_of_stream(residual_ptr, norm_ptr, counter_ptr, target, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Wait for all programs, then return `_norm` of the residual stream with the weight and bias at norm_ptr."""
    cols = _channels(BLOCK_C)
    weight = tl.load(norm_ptr + cols, mask=cols < C, other=0.0)
    bias = tl.load(norm_ptr + C + cols, mask=cols < C, other=0.0)
    _grid_barrier(counter_ptr, target)
    x = tl.load(residual_ptr + cols, mask=cols < C, other=0.0, cache_modifier=".cg")
    return _norm(x, weight, bias, eps, C, BLOCK_C)


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, mixed_ptr, peaks_ptr, sums_ptr, scale, head, split, first, end, n_slots,
    C: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Attend with one head to slots first .. end - 1. Store the split's weighted values, peak and sum of weights."""
    dims = tl.arange(0, HEAD_DIM)
    head_offset = head.to(tl.int64) * n_slots * HEAD_DIM
    query = tl.load(query_ptr + head * HEAD_DIM + dims, cache_modifier=".cg") * (scale * LOG2_E)

    peak, total = tl.full((), _LOWEST, dtype=tl.float32), 0.0
    mixed = tl.zeros((HEAD_DIM,), dtype=tl.float32)
    for start in range(first, end, BLOCK_KEYS):
        slots = start + tl.arange(0, BLOCK_KEYS)
        in_split = slots < end
        offsets = head_offset + slots[:, None] * HEAD_DIM + dims[None, :]
        keys = tl.load(key_ptr + offsets, mask=in_split[:, None], other=0.0, cache_modifier=".cg").to(tl.float32)
        values = tl.load(value_ptr + offsets, mask=in_split[:, None], other=0.0, cache_modifier=".cg").to(tl.float32)
        products = rounded_product(keys, query[None, :])
        scores = tl.where(in_split, tl.sum(products, axis=1), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_peak)
        shrink = tl.exp2(peak - new_peak)
        mixed = mixed * shrink + tl.sum(rounded_product(values, weights[:, None]), axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        peak = new_peak

    n_heads: tl.constexpr = C // HEAD_DIM
    tl.store(mixed_ptr + split * C + head * HEAD_DIM + dims, mixed)
    tl.store(peaks_ptr + split * n_heads + head, peak)
    tl.store(sums_ptr + split * n_heads + head, total)


@triton.jit
def _combine(
    mixed_ptr, peaks_ptr, sums_ptr, n_splits, C: tl.constexpr, BLOCK_C: tl.constexpr, MAX_SPLITS: tl.constexpr
):
    """The output of attention for all heads (parts, BLOCK_C / parts), from the first n_splits splits."""
    n_heads: tl.constexpr = C // HEAD_DIM
    heads, dims = tl.arange(0, BLOCK_C // HEAD_DIM), tl.arange(0, HEAD_DIM)
    offsets = heads[:, None] * HEAD_DIM + dims[None, :]

    peak = tl.full((BLOCK_C // HEAD_DIM,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_C // HEAD_DIM,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_C // HEAD_DIM, HEAD_DIM), dtype=tl.float32)
    # Unrolled, so that all splits load at the same time; masked loads of unused splits cost no traffic.
    for split in tl.static_range(MAX_SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        inside = heads < tl.where(split < n_splits, n_heads, 0)
        split_peak = tl.load(peaks_ptr + split * n_heads + heads, mask=inside, other=_LOWEST, cache_modifier=".cg")
        split_total = tl.load(sums_ptr + split * n_heads + heads, mask=inside, other=0.0, cache_modifier=".cg")
        split_mixed = tl.load(mixed_ptr + split * C + offsets, mask=inside[:, None], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, split_peak)
        shrink, split_shrink = tl.exp2(peak - new_peak), tl.exp2(split_peak - new_peak)
        mixed = mixed * shrink[:, None] + split_mixed * split_shrink[:, None]
        total = total * shrink + split_total * split_shrink
        peak = new_peak

    # Zeros where no key is seen.
    return tl.reshape(mixed / tl.where(total == 0.0, 1.0, total)[:, None], (_PARTS, BLOCK_C // _PARTS))


# One compiled kernel serves all these sizes and any alignment of these tensors, so that decoding never compiles.
@triton.jit(
    do_not_specialize=["n_layers", "n_slots", "n_vocab", "n_positions"],
    do_not_specialize_on_alignment=["tokens_ptr", "positions_ptr", "slots_ptr", "starts_ptr", "logits_ptr"],
)
def _persistent_decode_kernel(
    tokens_ptr, positions_ptr, slots_ptr, starts_ptr,
    wte_ptr, wpe_ptr, stream_ptr, biases_ptr, norms_ptr, scales_ptr, head_ptr, cache_ptr, logits_ptr,
    residual_ptr, query_ptr, mixed_ptr, peaks_ptr, sums_ptr, hidden_ptr, counter_ptr,
    n_layers, n_slots, n_vocab, n_positions, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, N_PROGRAMS: tl.constexpr, GROUPS: tl.constexpr, N_STAGES: tl.constexpr,
    QKV_SLICE: tl.constexpr, OUT_SLICE: tl.constexpr, FC_SLICE: tl.constexpr,
    QKV_END: tl.constexpr, OUT_END: tl.constexpr, FC_END: tl.constexpr, TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr, KEYS_PER_SPLIT: tl.constexpr, BLOCK_KEYS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """logits (V,) of the token that follows tokens[0], whose keys and values go to slot slots[0] of the cache.

    A weight row is C weights: a row of a matrix as (out, in), or a quarter of a row of the MLP's projection. A tile is
    TILE_ROWS weight rows. stream: (L, programs, TILES, TILE_ROWS, C). biases: (L, programs, TILES, TILE_ROWS), one per
    weight row. norms: (2L + 1, 2, C), weight and bias.
    """
    TILE_ROWS: tl.constexpr = 4 * GROUPS
    N_HEADS: tl.constexpr = C // HEAD_DIM

    program = tl.program_id(0)
    cols, weight_rows = _channels(BLOCK_C), tl.arange(0, TILE_ROWS)
    in_row = cols < C
    dtype: tl.constexpr = stream_ptr.dtype.element_ty
    tile_cols, tile_rows = cols[:, None, :], weight_rows[None, :, None]
    quarter = tl.arange(0, 8) // 2  # Of each column of `_operand`.
    serves_row = (weight_rows[:, None] % 4 == quarter[None, :])[None, :, :]
    # The end of this program's slice of each phase.
    qkv_end = tl.minimum((program + 1) * QKV_SLICE, 3 * C)
    out_end = tl.minimum((program + 1) * OUT_SLICE, C)
    fc_end = tl.minimum((program + 1) * FC_SLICE, 4 * C)
    head_slice = tl.cdiv(n_vocab, N_PROGRAMS)
    head_end = tl.minimum((program + 1) * head_slice, n_vocab)
    # Round down: other programs may already have arrived at the first barrier, but never all, because this one has not.
    target = tl.load(counter_ptr, volatile=True) // N_PROGRAMS * N_PROGRAMS

    token = tl.minimum(tl.maximum(tl.load(tokens_ptr), 0), n_vocab - 1)
    position = tl.minimum(tl.maximum(tl.load(positions_ptr), 0), n_positions - 1)
    slot = tl.load(slots_ptr)
    cached_end = tl.where((slot >= 0) & (slot < n_slots), qkv_end, 0)
    first_key = tl.minimum(tl.maximum(tl.load(starts_ptr), 0), n_slots).to(tl.int32)
    end_key = tl.minimum(tl.maximum(slot + 1, 0), n_slots).to(tl.int32)
    n_splits = tl.minimum(tl.maximum(tl.cdiv(end_key - first_key, KEYS_PER_SPLIT), 1), MAX_SPLITS)
    keys_per_split = tl.cdiv(end_key - first_key, n_splits)

    # Every program stores the whole embedding, with the same values, so that no program waits for another.
    x = tl.load(wte_ptr + token * C + cols, mask=in_row, other=0.0).to(tl.float32)
    x += tl.load(wpe_ptr + position * C + cols, mask=in_row, other=0.0).to(tl.float32)
    tl.store(residual_ptr + cols, x, mask=in_row)
    weight = tl.load(norms_ptr + cols, mask=in_row, other=0.0)
    x = _norm(x, weight, tl.load(norms_ptr + C + cols, mask=in_row, other=0.0), eps, C, BLOCK_C)
    inputs = _operand(x[:, :, None], dtype)
    tl.debug_barrier()

    n_stream_tiles = n_layers * TILES
    for i in tl.range(0, n_stream_tiles + tl.cdiv(head_slice, TILE_ROWS), num_stages=N_STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        step = tl.cast(i, tl.int32)  # In the interpreter i is a Python int.
        in_head = step >= n_stream_tiles
        layer = step // TILES
        t = tl.where(in_head, TILES, step % TILES)
        # The tile's first weight row, counted from the start of its phase, and the number of weight rows of the phase.
        first_row = t - tl.where(t < QKV_END, 0, tl.where(t < OUT_END, QKV_END, tl.where(t < FC_END, OUT_END, FC_END)))
        first_row = tl.where(in_head, step - n_stream_tiles, first_row) * TILE_ROWS
        n_weight_rows = tl.where(t < OUT_END, out_end - program * OUT_SLICE, fc_end - program * FC_SLICE)
        n_weight_rows = tl.where(t < QKV_END, qkv_end - program * QKV_SLICE, n_weight_rows)
        n_weight_rows = tl.where(t < FC_END, n_weight_rows, 4 * (out_end - program * OUT_SLICE))
        n_weight_rows = tl.where(in_head, head_end - program * head_slice, n_weight_rows)
        tile_index = (layer.to(tl.int64) * N_PROGRAMS + program) * TILES + t
        head_row = program.to(tl.int64) * head_slice + first_row
        tile_ptr = tl.where(in_head, head_ptr + head_row * C, stream_ptr + tile_index * (TILE_ROWS * C))
        in_tile = (tile_rows < n_weight_rows - first_row) & (tile_cols < C)
        tile = tl.load(tile_ptr + tile_rows * C + tile_cols, mask=in_tile, other=0.0)
        has_bias = weight_rows < tl.where(in_head, 0, TILE_ROWS)
        bias = tl.load(biases_ptr + tile_index * TILE_ROWS + weight_rows, mask=has_bias, other=0.0)
        products = tl.where(serves_row, tl.dot(tile, inputs, input_precision="ieee"), 0.0)  # (parts, TILE_ROWS, 8)
        sums = tl.sum(tl.sum(products, axis=2), axis=0) + bias

        layer_offset = layer.to(tl.int64) * 2 * C * n_slots
        key_ptr, value_ptr = cache_ptr + layer_offset, cache_ptr + layer_offset + n_slots.to(tl.int64) * C
        norm_ptr = norms_ptr + layer.to(tl.int64) * 4 * C

        if t < QKV_END:
            rows = program * QKV_SLICE + first_row + weight_rows
            kind, channel = rows // C, rows % C
            cache_offsets = (channel // HEAD_DIM * n_slots.to(tl.int64) + slot) * HEAD_DIM + channel % HEAD_DIM
            tl.store(query_ptr + channel, sums, mask=(rows < qkv_end) & (kind == 0))
            appended = sums.to(cache_ptr.dtype.element_ty)
            tl.store(key_ptr + cache_offsets, appended, mask=(rows < cached_end) & (kind == 1))
            tl.store(value_ptr + cache_offsets, appended, mask=(rows < cached_end) & (kind == 2))
            if t == QKV_END - 1:
                scale = tl.load(scales_ptr + layer)
                target += N_PROGRAMS
                _grid_barrier(counter_ptr, target)
                for item in range(program, n_splits * N_HEADS, N_PROGRAMS):
                    head, split = item // n_splits, item % n_splits
                    first = first_key + split * keys_per_split
                    _attend(query_ptr, key_ptr, value_ptr, mixed_ptr, peaks_ptr, sums_ptr, scale, head, split,
                            first, tl.minimum(first + keys_per_split, end_key), n_slots, C, BLOCK_KEYS)  # fmt: skip
                target += N_PROGRAMS
                _grid_barrier(counter_ptr, target)
                x = _combine(mixed_ptr, peaks_ptr, sums_ptr, n_splits, C, BLOCK_C, MAX_SPLITS)
                inputs = _operand(x[:, :, None], dtype)
        elif t < OUT_END:
            out_rows = program * OUT_SLICE + first_row + weight_rows
            before = tl.load(residual_ptr + out_rows, mask=out_rows < out_end, other=0.0, cache_modifier=".cg")
            tl.store(residual_ptr + out_rows, before + sums, mask=out_rows < out_end)
            if t == OUT_END - 1:
                target += N_PROGRAMS
                x = _norm_of_stream(residual_ptr, norm_ptr + 2 * C, counter_ptr, target, eps, C, BLOCK_C)
                inputs = _operand(x[:, :, None], dtype)
        elif t < FC_END:
            fc_rows = program * FC_SLICE + first_row + weight_rows
            activated, _ = activation_and_derivative(sums, ACTIVATION)
            tl.store(hidden_ptr + fc_rows, activated, mask=fc_rows < fc_end)
            if t == FC_END - 1:
                target += N_PROGRAMS
                _grid_barrier(counter_ptr, target)
                quarter_cols, in_quarter = quarter[None, None, :] * C + cols[:, :, None], cols[:, :, None] < C
                hidden = tl.load(hidden_ptr + quarter_cols, mask=in_quarter, other=0.0, cache_modifier=".cg")
                inputs = _operand(hidden, dtype)
        elif t < TILES:
            mlp_rows = program * OUT_SLICE + first_row // 4 + tl.arange(0, GROUPS)
            stream = tl.load(residual_ptr + mlp_rows, mask=mlp_rows < out_end, other=0.0, cache_modifier=".cg")
            projected = tl.sum(tl.reshape(sums, (GROUPS, 4)), axis=1)
            tl.store(residual_ptr + mlp_rows, stream + projected, mask=mlp_rows < out_end)
            if t == TILES - 1:
                # The first norm of the next layer, or the one before the head.
                target += N_PROGRAMS
                x = _norm_of_stream(residual_ptr, norm_ptr + 4 * C, counter_ptr, target, eps, C, BLOCK_C)
                inputs = _operand(x[:, :, None], dtype)
        else:
            tl.store(logits_ptr + head_row + weight_rows, sums, mask=head_row + weight_rows < head_end)


# --- sizes ----------------------------------------------------------------------------------------------------------


def constants(
    n_channels: int, dtype: torch.dtype, architecture: str, n_programs: int, activation: str
) -> dict[str, Any]:
    """The kernel's compile-time arguments for a model and a GPU on which `persistent_ring` is not None."""
    ring = tiles.persistent_ring(n_channels, dtype, architecture)
    assert ring is not None
    return {
        "C": n_channels,
        "BLOCK_C": max(256, triton.next_power_of_2(n_channels)),
        "N_PROGRAMS": n_programs,
        "GROUPS": ring.groups,
        "N_STAGES": ring.num_stages,
        **_tiles(n_channels, n_programs, ring.groups),
        "MAX_SPLITS": max(1, min(tiles.PERSISTENT_MAX_SPLITS, n_programs * HEAD_DIM.value // n_channels)),
        "KEYS_PER_SPLIT": tiles.PERSISTENT_KEYS_PER_SPLIT,
        "BLOCK_KEYS": tiles.PERSISTENT_BLOCK_KEYS,
        "ACTIVATION": activation,
    }


def _tiles(n_channels: int, n_programs: int, groups: int) -> dict[str, int]:
    """Rows of a program's slice of each matrix, and the index of the first tile after each phase of a layer."""
    qkv, out, fc = (cdiv(n * n_channels, n_programs) for n in (3, 1, 4))
    n_weight_rows = qkv, out, fc, 4 * out
    ends = accumulate(cdiv(n, 4 * groups) for n in n_weight_rows)
    names = "QKV_END", "OUT_END", "FC_END", "TILES"
    return {"QKV_SLICE": qkv, "OUT_SLICE": out, "FC_SLICE": fc, **dict(zip(names, ends, strict=True))}


def n_weight_rows(n_channels: int, n_programs: int, groups: int) -> int:
    """Weight rows of a layer in the stream of one program, including those that pad its tiles."""
    return 4 * groups * _tiles(n_channels, n_programs, groups)["TILES"]
