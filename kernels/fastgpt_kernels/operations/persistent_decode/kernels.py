"""One kernel for the whole decode step of one row, and the forms in which it ships.

All programs stay resident, one on a multiprocessor, and meet at grid barriers, five a layer:

    1  LN1 + QKV, keys and values to the cache        4  LN2 + FC + activation
    2  attention, keys split among the programs       5  projection of the MLP + residual
    3  sum of the splits, projection + residual       after the last layer: LN + head

Every program owns a slice of the outputs of each phase. The weights of its slices lie behind each other in the order in
which it uses them, in tiles of one size, then come its rows of the head: one loop walks this stream, and since the
address of a tile depends on nothing but the loop's counter, the compiler fetches tiles through a ring in shared memory
while the phases before them still compute or wait.
"""

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from ...common.activation_kernels import activation_and_derivative
from ...common.launch import cdiv
from . import tiles

_LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score, yet a number: the difference of two of them is zero.
_LOWEST = tl.constexpr(-3.4e38)
HEAD_DIM = tl.constexpr(64)
# Parts of a row: each of 8 warps multiplies one of them, and the sums of all meet at the end.
_PARTS = tl.constexpr(8)


@triton.jit(noinline=True)
def _arrive(counter_ptr):
    """Not inlined, because the compiler gives up the ring where it sees `debug_barrier` in the body of its loop.

    It must not use shared memory: that of a function which is not inlined is the ring's in triton 3.6.
    """
    # The stores of all threads come before the release by one of them.
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _grid_barrier(counter_ptr, target):
    """Until the counter, which is never reset, shows that every program has arrived."""
    _arrive(counter_ptr)
    # One thread polls and tells the others, whose loads thereby come after its acquire.
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def _channels(BLOCK_C: tl.constexpr):
    """0 .. BLOCK_C - 1 as (parts, BLOCK_C / parts), the form of every row here."""
    return tl.arange(0, _PARTS)[:, None] * (BLOCK_C // _PARTS) + tl.arange(0, BLOCK_C // _PARTS)[None, :]


@triton.jit
def _norm(x, weight, bias, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The norm of a row of C channels.

    Without the second centring of `layer_norm_kernels`: all programs would wait for it, twice a layer.
    """
    centered = tl.where(_channels(BLOCK_C) < C, x - tl.sum(x) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered) / C + eps)
    return centered * rstd * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """Columns x (parts, K, 1 or 8) in float32 as what a tile meets on the tensor cores, (parts, K, 8) in dtype.

    Column 2q meets the units of quarter q, for which x may have a column of its own, with x rounded to dtype, and
    column 2q + 1 with what that leaves: together they have twice the bits of dtype.
    """
    is_rounded = tl.arange(0, 8)[None, None, :] % 2 == 0
    rounded = x.to(dtype)
    rest = (x - rounded.to(tl.float32)).to(dtype)
    return tl.where(is_rounded, rounded, rest)


@triton.jit
def _norm_of_stream(residual_ptr, norm_ptr, counter_ptr, target, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """`_norm` of the residual stream as all programs have left it, with the weight and bias at norm_ptr."""
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
    """One head over the slots first .. end - 1, as split `split`: values mixed, the largest score, sum of weights."""
    dims = tl.arange(0, HEAD_DIM)
    head_offset = head.to(tl.int64) * n_slots * HEAD_DIM
    query = tl.load(query_ptr + head * HEAD_DIM + dims, cache_modifier=".cg") * (scale * _LOG2_E)

    peak, total = tl.full((), _LOWEST, dtype=tl.float32), 0.0
    mixed = tl.zeros((HEAD_DIM,), dtype=tl.float32)
    for start in range(first, end, BLOCK_KEYS):
        slots = start + tl.arange(0, BLOCK_KEYS)
        in_split = slots < end
        offsets = head_offset + slots[:, None] * HEAD_DIM + dims[None, :]
        keys = tl.load(key_ptr + offsets, mask=in_split[:, None], other=0.0, cache_modifier=".cg").to(tl.float32)
        values = tl.load(value_ptr + offsets, mask=in_split[:, None], other=0.0, cache_modifier=".cg").to(tl.float32)
        scores = tl.where(in_split, tl.sum(keys * query[None, :], axis=1), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_peak)
        shrink = tl.exp2(peak - new_peak)
        mixed = mixed * shrink + tl.sum(values * weights[:, None], axis=0)
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
    """What all heads attended to (parts, BLOCK_C / parts), from the first n_splits splits."""
    n_heads: tl.constexpr = C // HEAD_DIM
    heads, dims = tl.arange(0, BLOCK_C // HEAD_DIM), tl.arange(0, HEAD_DIM)
    offsets = heads[:, None] * HEAD_DIM + dims[None, :]

    peak = tl.full((BLOCK_C // HEAD_DIM,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_C // HEAD_DIM,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_C // HEAD_DIM, HEAD_DIM), dtype=tl.float32)
    # Unrolled, so that the splits are fetched at once; those that there are not cost no traffic.
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

    # A row that attends nothing gives zeros.
    return tl.reshape(mixed / tl.where(total == 0.0, 1.0, total)[:, None], (_PARTS, BLOCK_C // _PARTS))


# One compiled form for all sizes, and for any element of a larger tensor: decoding must not meet the compiler.
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

    A unit is C weights: a row of a matrix as (out, in), or a quarter of a row of the MLP's projection. A tile is
    4 * GROUPS units. stream: (L, programs, TILES, units, C), and biases (L, programs, TILES, units) beside it.
    norms: (2L + 1, 2, C), weight and bias.
    """
    UNITS: tl.constexpr = 4 * GROUPS
    N_HEADS: tl.constexpr = C // HEAD_DIM

    program = tl.program_id(0)
    cols, units = _channels(BLOCK_C), tl.arange(0, UNITS)
    in_row = cols < C
    dtype: tl.constexpr = stream_ptr.dtype.element_ty
    tile_cols, tile_units = cols[:, None, :], units[None, :, None]
    quarter = tl.arange(0, 8) // 2  # that a column of `_operand` belongs to
    meets = (units[:, None] % 4 == quarter[None, :])[None, :, :]
    # The end of this program's slice of each phase.
    qkv_end = tl.minimum((program + 1) * QKV_SLICE, 3 * C)
    out_end = tl.minimum((program + 1) * OUT_SLICE, C)
    fc_end = tl.minimum((program + 1) * FC_SLICE, 4 * C)
    head_slice = tl.cdiv(n_vocab, N_PROGRAMS)
    head_end = tl.minimum((program + 1) * head_slice, n_vocab)
    # A program that reads the counter late sees less than N_PROGRAMS arrivals at the first barrier: its own is missing.
    target = tl.load(counter_ptr, volatile=True) // N_PROGRAMS * N_PROGRAMS

    token = tl.minimum(tl.maximum(tl.load(tokens_ptr), 0), n_vocab - 1)
    position = tl.minimum(tl.maximum(tl.load(positions_ptr), 0), n_positions - 1)
    slot = tl.load(slots_ptr)
    cached_end = tl.where((slot >= 0) & (slot < n_slots), qkv_end, 0)
    first_key = tl.minimum(tl.maximum(tl.load(starts_ptr), 0), n_slots).to(tl.int32)
    end_key = tl.minimum(tl.maximum(slot + 1, 0), n_slots).to(tl.int32)
    n_splits = tl.minimum(tl.maximum(tl.cdiv(end_key - first_key, KEYS_PER_SPLIT), 1), MAX_SPLITS)
    keys_per_split = tl.cdiv(end_key - first_key, n_splits)

    # Every program writes all of the embedding, the same values: nobody has to wait for it.
    x = tl.load(wte_ptr + token * C + cols, mask=in_row, other=0.0).to(tl.float32)
    x += tl.load(wpe_ptr + position * C + cols, mask=in_row, other=0.0).to(tl.float32)
    tl.store(residual_ptr + cols, x, mask=in_row)
    weight = tl.load(norms_ptr + cols, mask=in_row, other=0.0)
    x = _norm(x, weight, tl.load(norms_ptr + C + cols, mask=in_row, other=0.0), eps, C, BLOCK_C)
    inputs = _operand(x[:, :, None], dtype)
    tl.debug_barrier()

    n_stream_tiles = n_layers * TILES
    for i in tl.range(0, n_stream_tiles + tl.cdiv(head_slice, UNITS), num_stages=N_STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        step = tl.cast(i, tl.int32)  # A Python int in the interpreter.
        in_head = step >= n_stream_tiles
        layer = step // TILES
        t = tl.where(in_head, TILES, step % TILES)
        # Of this tile's first unit, counted in its phase; and how many units the phase has.
        unit = t - tl.where(t < QKV_END, 0, tl.where(t < OUT_END, QKV_END, tl.where(t < FC_END, OUT_END, FC_END)))
        unit = tl.where(in_head, step - n_stream_tiles, unit) * UNITS
        n_units = tl.where(t < OUT_END, out_end - program * OUT_SLICE, fc_end - program * FC_SLICE)
        n_units = tl.where(t < QKV_END, qkv_end - program * QKV_SLICE, n_units)
        n_units = tl.where(t < FC_END, n_units, 4 * (out_end - program * OUT_SLICE))
        n_units = tl.where(in_head, head_end - program * head_slice, n_units)
        place = (layer.to(tl.int64) * N_PROGRAMS + program) * TILES + t
        head_row = program.to(tl.int64) * head_slice + unit
        tile_ptr = tl.where(in_head, head_ptr + head_row * C, stream_ptr + place * (UNITS * C))
        in_tile = (tile_units < n_units - unit) & (tile_cols < C)
        tile = tl.load(tile_ptr + tile_units * C + tile_cols, mask=in_tile, other=0.0)
        bias = tl.load(biases_ptr + place * UNITS + units, mask=units < tl.where(in_head, 0, UNITS), other=0.0)
        products = tl.where(meets, tl.dot(tile, inputs, input_precision="ieee"), 0.0)  # (parts, units, 8)
        sums = tl.sum(tl.sum(products, axis=2), axis=0) + bias

        layer_offset = layer.to(tl.int64) * 2 * C * n_slots
        key_ptr, value_ptr = cache_ptr + layer_offset, cache_ptr + layer_offset + n_slots.to(tl.int64) * C
        norm_ptr = norms_ptr + layer.to(tl.int64) * 4 * C

        if t < QKV_END:
            rows = program * QKV_SLICE + unit + units
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
            out_rows = program * OUT_SLICE + unit + units
            before = tl.load(residual_ptr + out_rows, mask=out_rows < out_end, other=0.0, cache_modifier=".cg")
            tl.store(residual_ptr + out_rows, before + sums, mask=out_rows < out_end)
            if t == OUT_END - 1:
                target += N_PROGRAMS
                x = _norm_of_stream(residual_ptr, norm_ptr + 2 * C, counter_ptr, target, eps, C, BLOCK_C)
                inputs = _operand(x[:, :, None], dtype)
        elif t < FC_END:
            fc_rows = program * FC_SLICE + unit + units
            activated, _ = activation_and_derivative(sums, ACTIVATION)
            tl.store(hidden_ptr + fc_rows, activated, mask=fc_rows < fc_end)
            if t == FC_END - 1:
                target += N_PROGRAMS
                _grid_barrier(counter_ptr, target)
                quarter_cols, in_quarter = quarter[None, None, :] * C + cols[:, :, None], cols[:, :, None] < C
                hidden = tl.load(hidden_ptr + quarter_cols, mask=in_quarter, other=0.0, cache_modifier=".cg")
                inputs = _operand(hidden, dtype)
        elif t < TILES:
            mlp_rows = program * OUT_SLICE + unit // 4 + tl.arange(0, GROUPS)
            stream = tl.load(residual_ptr + mlp_rows, mask=mlp_rows < out_end, other=0.0, cache_modifier=".cg")
            projected = tl.sum(tl.reshape(sums, (GROUPS, 4)), axis=1)
            tl.store(residual_ptr + mlp_rows, stream + projected, mask=mlp_rows < out_end)
            if t == TILES - 1:
                # The first norm of the next layer, or the one before the head.
                target += N_PROGRAMS
                x = _norm_of_stream(residual_ptr, norm_ptr + 4 * C, counter_ptr, target, eps, C, BLOCK_C)
                inputs = _operand(x[:, :, None], dtype)
        else:
            tl.store(logits_ptr + head_row + units, sums, mask=head_row + units < head_end)


# --- sizes ----------------------------------------------------------------------------------------------------------


def constants(
    n_channels: int, dtype: torch.dtype, architecture: str, n_programs: int, activation: str
) -> dict[str, Any]:
    """The compile-time arguments of the kernel for a model and a GPU that has a ring."""
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
    """Rows of a program's slice of each matrix, and the first tile behind each phase of a layer."""
    qkv, out, fc = (cdiv(n * n_channels, n_programs) for n in (3, 1, 4))
    n_units = qkv, out, fc, 4 * out
    ends = accumulate(cdiv(n, 4 * groups) for n in n_units)
    names = "QKV_END", "OUT_END", "FC_END", "TILES"
    return {"QKV_SLICE": qkv, "OUT_SLICE": out, "FC_SLICE": fc, **dict(zip(names, ends, strict=True))}


def n_units(n_channels: int, n_programs: int, groups: int) -> int:
    """Units of a layer in the stream of one program, with those that fill up tiles."""
    return 4 * groups * _tiles(n_channels, n_programs, groups)["TILES"]
