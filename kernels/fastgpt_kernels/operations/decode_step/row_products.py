"""A few rows times a matrix, on tensor cores where the matrix is in half precision or int8.

Tensor cores multiply half precision, but a row is float32. It is split into a sum of half-precision rows, each of which
is multiplied: sums of exact products in float32, as without tensor cores.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton types compile-time parameters as constexpr, which no literal is, and its ranges as not iterable.

import triton
import triton.language as tl

from ...common.arithmetic import rounded_product


@triton.jit
def _rows_times(x, weight, SLICES: tl.constexpr, IS_TRANSPOSED: tl.constexpr = False):
    """x (rows, in) @ weight (in, out) -> (rows, out) in float32, without rounding x to weight's dtype.

    x: float32 or weight's dtype. SLICES: 0 without tensor cores. With them, each warp multiplies one slice of the inner
    axis, because the rows are too few for more than one warp. IS_TRANSPOSED: weight is (out, in). With `tl.trans` in
    its place, triton reads a tile that was copied to shared memory by single elements, 16 of which lie in one bank.
    """
    if SLICES == 0:
        y = _rows_times_without_tensor_cores(x.to(tl.float32), weight, IS_TRANSPOSED)
    else:
        n_in: tl.constexpr = x.shape[1] // SLICES
        if IS_TRANSPOSED:
            slices = tl.permute(tl.reshape(weight, (weight.shape[0], SLICES, n_in)), (1, 0, 2))
        else:
            slices = tl.permute(tl.reshape(weight, (SLICES, n_in, weight.shape[1])), (0, 2, 1))
        if weight.dtype == tl.int8:  # Every value is exact in either dtype.
            slices = slices.to(tl.bfloat16 if x.dtype == tl.float32 else x.dtype)
        columns = tl.permute(tl.reshape(x, (x.shape[0], SLICES, n_in)), (1, 2, 0))
        y = tl.trans(tl.sum(_unrounded_product(slices, columns), axis=0))
    return y


@triton.jit
def _unrounded_product(weight, x):
    """weight (slices, out, in) @ x (slices, in, rows) in float32. x: in weight's dtype, or float32.

    In bfloat16 three parts hold all 24 bits of a float32. In float16 what they leave out is at most 2^-25, and x must
    stay below 65504, as with torch.
    """
    high = x.to(weight.dtype)
    if x.dtype == weight.dtype:
        y = tl.dot(weight, high)
    else:
        rest = x - high.to(tl.float32)
        middle = rest.to(weight.dtype)
        low = (rest - middle.to(tl.float32)).to(weight.dtype)
        y = tl.dot(weight, high, tl.dot(weight, middle, tl.dot(weight, low)))
    return y


@triton.jit
def _computed_once(x):
    """x, as a sum over an axis of one, which triton computes in a layout of its own.

    Otherwise it may compute all that leads to x in the layout of the product that reads x, in which up to eight lanes
    hold the same element.
    """
    return tl.sum(x[None, :, :], axis=0)


@triton.jit
def _rows_times_without_tensor_cores(x, weight, IS_TRANSPOSED: tl.constexpr):
    n_rows: tl.constexpr = x.shape[0]
    n_out: tl.constexpr = weight.shape[0] if IS_TRANSPOSED else weight.shape[1]
    n_in: tl.constexpr = weight.shape[1] if IS_TRANSPOSED else weight.shape[0]
    row_index = tl.arange(0, n_rows)[:, None]
    values = weight.to(tl.float32)
    y = tl.zeros((n_rows, n_out), dtype=tl.float32)
    for row in tl.static_range(n_rows):
        one_row = tl.sum(tl.where(row_index == row, x, 0.0), axis=0)
        row_values = one_row[None, :] if IS_TRANSPOSED else one_row[:, None]
        # A longer axis has several elements for each of the 512 threads that a program has at most.
        products = rounded_product(values, row_values) if n_in <= 512 else values * row_values
        y = tl.where(row_index == row, tl.sum(products, axis=1 if IS_TRANSPOSED else 0)[None, :], y)
    return y
