"""The kernels of layer_norm and add_layer_norm.

Each program holds whole rows in registers. Forward saves no statistics: backward recomputes them from the rows, which
it loads anyway. This arithmetic hides behind the loads, and a saved mean would be rounded, which costs digits in rows
far from zero.
"""

# pyright: reportGeneralTypeIssues=false
# Triton 3.7 declares that some jit functions return None.

import triton
import triton.language as tl

from ...common.arithmetic import rounded_product


@triton.jit
def _normalise(x, in_row, n_cols, eps):
    """(x - mean) / std of each row of x (rows, cols), zero outside in_row, and 1 / std (rows,)."""
    mean = tl.sum(x, axis=1) / n_cols
    centered = tl.where(in_row, x - mean[:, None], 0.0)
    # A second centring removes the rounding error of the mean: 1000x smaller error when |mean| >> std.
    correction = tl.sum(centered, axis=1) / n_cols
    centered = tl.where(in_row, centered - correction[:, None], 0.0)
    variance = tl.sum(rounded_product(centered, centered), axis=1) / n_cols + eps
    # Correctly rounded on purpose, because plain float32 square roots and divisions are approximate.
    rstd = 1.0 / tl.sqrt(variance) if variance.dtype == tl.float64 else tl.div_rn(1.0, tl.sqrt_rn(variance))
    return centered * rstd[:, None], rstd


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr,
    x_row_stride, residual_row_stride, n_rows, n_cols,
    EPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_ROWS rows of x (n_rows, n_cols), or of x + residual, which it stores too."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    in_cols = cols < n_cols
    in_row = (rows < n_rows)[:, None] & in_cols[None, :]
    out_offsets = rows[:, None] * n_cols + cols[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=in_row, other=0.0).to(ACCUMULATOR)
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(ACCUMULATOR)
    bias = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(ACCUMULATOR)
    if HAS_RESIDUAL:
        residual_offsets = rows[:, None] * residual_row_stride + cols[None, :]
        x += tl.load(residual_ptr + residual_offsets, mask=in_row, other=0.0).to(ACCUMULATOR)
        # Normalise the rounded sum, because backward recomputes from the stored one.
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out_offsets, rounded, mask=in_row)
        x = rounded.to(ACCUMULATOR)

    normalised, _ = _normalise(x, in_row, n_cols, EPS)
    y = normalised * weight[None, :] + bias[None, :]

    tl.store(y_ptr + out_offsets, y.to(y_ptr.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_bwd_kernel(
    x_ptr, weight_ptr, dy_ptr, dsum_ptr, dx_ptr, dadded_ptr, dweight_partial_ptr, dbias_partial_ptr,
    x_row_stride, dy_row_stride, dsum_row_stride, n_rows, n_cols,
    EPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, HAS_DSUM: tl.constexpr,
    HAS_DADDED: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """One program computes dx of every n_programs-th tile of rows, and its partial sums of dweight and dbias.

    dsum: the gradient that reaches x around the norm. dadded: dx once more, in the dtype of what was added to the
    stream.
    """
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_COLS)
    in_cols = cols < n_cols
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(ACCUMULATOR)

    dweight = tl.zeros((BLOCK_COLS,), dtype=ACCUMULATOR)
    dbias = tl.zeros((BLOCK_COLS,), dtype=ACCUMULATOR)
    for tile in range(program, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        rows = tl.arange(0, BLOCK_ROWS).to(tl.int64) + tile * BLOCK_ROWS
        in_row = (rows < n_rows)[:, None] & in_cols[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=in_row, other=0.0).to(ACCUMULATOR)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=in_row, other=0.0).to(ACCUMULATOR)

        normalised, rstd = _normalise(x, in_row, n_cols, EPS)
        if EPS < 1e-37:  # Rows past the end may be 0 / 0, which the sum of dweight must not see.
            normalised = tl.where(in_row, normalised, 0.0)
        dnormalised = rounded_product(dy, weight[None, :])
        mean_d = tl.sum(dnormalised, axis=1) / n_cols
        mean_dn = tl.sum(rounded_product(dnormalised, normalised), axis=1) / n_cols
        dx = (dnormalised - mean_d[:, None] - normalised * mean_dn[:, None]) * rstd[:, None]
        if HAS_DSUM:
            dsum_offsets = rows[:, None] * dsum_row_stride + cols[None, :]
            dx += tl.load(dsum_ptr + dsum_offsets, mask=in_row, other=0.0).to(ACCUMULATOR)
        dweight += tl.sum(dy * normalised, axis=0)
        dbias += tl.sum(dy, axis=0)

        out_offsets = rows[:, None] * n_cols + cols[None, :]
        tl.store(dx_ptr + out_offsets, dx.to(dx_ptr.dtype.element_ty), mask=in_row)
        if HAS_DADDED:
            tl.store(dadded_ptr + out_offsets, dx.to(dadded_ptr.dtype.element_ty), mask=in_row)

    partial_offsets = program.to(tl.int64) * n_cols + cols
    tl.store(dweight_partial_ptr + partial_offsets, dweight, mask=in_cols)
    tl.store(dbias_partial_ptr + partial_offsets, dbias, mask=in_cols)


@triton.jit(do_not_specialize=["n_partials"])
def _layer_norm_bwd_reduce_kernel(
    dweight_partial_ptr, dbias_partial_ptr, dweight_ptr, dbias_ptr, n_partials, n_cols,
    BLOCK_PARTIALS: tl.constexpr, BLOCK_COLS: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_COLS columns of the partial gradients (n_partials, n_cols), in a fixed order."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_cols = cols < n_cols

    dweight = tl.zeros((BLOCK_PARTIALS, BLOCK_COLS), dtype=ACCUMULATOR)
    dbias = tl.zeros((BLOCK_PARTIALS, BLOCK_COLS), dtype=ACCUMULATOR)
    for start in range(0, n_partials, BLOCK_PARTIALS):
        partials = tl.arange(0, BLOCK_PARTIALS).to(tl.int64) + start
        inside = (partials < n_partials)[:, None] & in_cols[None, :]
        offsets = partials[:, None] * n_cols + cols[None, :]
        dweight += tl.load(dweight_partial_ptr + offsets, mask=inside, other=0.0)
        dbias += tl.load(dbias_partial_ptr + offsets, mask=inside, other=0.0)

    tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=in_cols)
    tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=in_cols)
