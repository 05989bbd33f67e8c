"""The kernels of a decode step that more rows take than a program can hold: norms and products as kernels of their own.

The stream and the partial sums are those of `kernels.py`, and so are the embedding and attention.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton types compile-time parameters as constexpr, which no literal is, and its ranges as not iterable.

import triton
import triton.language as tl

from ...common.arithmetic import activation_and_derivative
from ..layer_norm.kernels import _normalise
from .kernels import _await_previous_launch, _load_residual, _load_weight, _scaled


@triton.jit
def _decode_norm_kernel(
    stream_ptr, partial_ptr, partial_bias_ptr, norm_weight_ptr, norm_bias_ptr, new_stream_ptr, y_ptr,
    n_rows, n_cols, eps,
    BLOCK_COLS: tl.constexpr, N_PARTIALS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program adds the partial sums to one row of the stream, stores the sum, and normalises it.

    new_stream: memory other than the stream's, because several threads may hold an element, and one could read what
    another has stored.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK_COLS)
    in_cols = cols < n_cols
    inside = in_cols[None, :]
    offsets = rows[:, None] * n_cols + cols[None, :]
    norm_weight = tl.load(norm_weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    _await_previous_launch(OVERLAP)

    x = _load_residual(stream_ptr, partial_ptr, partial_bias_ptr, rows, cols, inside, n_rows, n_cols, N_PARTIALS)
    if N_PARTIALS > 0:
        tl.store(new_stream_ptr + offsets, x, mask=inside)
    normalised, _ = _normalise(x, inside, n_cols, eps)
    y = normalised * norm_weight[None, :] + norm_bias[None, :]

    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decode_product_kernel(
    x_ptr, weight_ptr, steps_ptr, scale_ptr, bias_ptr, y_ptr, n_rows, n_cols, n_out, cols_per_part,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_OUT: tl.constexpr, N_PARTS: tl.constexpr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of act(x @ weight * scale + bias) on tensor cores, over one part of the columns of x.

    x: (n_rows, n_cols). weight: (n_cols, n_out), in floats, int8 or int4 (`_load_weight`); x's dtype holds every int8
    value exactly. The sums of part p go to y[p] (n_rows, n_out).
    """
    n_tiles = tl.cdiv(n_out, BLOCK_OUT)
    tile, part = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles % N_PARTS
    rows = (tl.program_id(0) // (n_tiles * N_PARTS)).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outs = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_rows, in_out = rows < n_rows, outs < n_out
    first = part * cols_per_part
    end = tl.minimum(first + cols_per_part, n_cols)

    # The first block of the weights is loaded before the wait, and multiplied last: in its turn, it would keep the loop
    # from asking for the others.
    cols = first + tl.arange(0, BLOCK_COLS)
    in_cols = cols < end
    first_weight = _load_weight(
        weight_ptr, steps_ptr, scale_ptr, first, end, outs, in_out, n_cols, n_out, BLOCK_COLS, GROUP, ""
    )
    _await_previous_launch(OVERLAP)
    in_x = in_rows[:, None] & in_cols[None, :]
    first_x = tl.load(x_ptr + rows[:, None] * n_cols + cols[None, :], mask=in_x, other=0.0)

    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in tl.range(first + BLOCK_COLS, end, BLOCK_COLS, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_COLS)
        in_cols = cols < end
        x = tl.load(x_ptr + rows[:, None] * n_cols + cols[None, :], mask=in_rows[:, None] & in_cols[None, :], other=0.0)
        weight = _load_weight(
            weight_ptr, steps_ptr, scale_ptr, start, end, outs, in_out, n_cols, n_out, BLOCK_COLS, GROUP, ""
        )
        sums = tl.dot(x, weight.to(x.dtype), sums, input_precision="ieee")
    sums = tl.dot(first_x, first_weight.to(first_x.dtype), sums, input_precision="ieee")

    y = _scaled(sums, scale_ptr, outs, in_out)
    if HAS_BIAS:
        y += tl.load(bias_ptr + outs, mask=in_out, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        y, _ = activation_and_derivative(y, ACTIVATION)
    y_offsets = (part * n_rows + rows)[:, None] * n_out + outs[None, :]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & in_out[None, :])
