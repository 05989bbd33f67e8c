"""The kernels of gelu_mlp: three products with fused epilogues, and one pass over the rows of dout.

Arguments named `_ref` are matrices with dense rows. They are pointers, or with DESCRIPTORS tensor descriptors made by
the launcher, through which Hopper copies whole tiles. A grid may have any number n of programs, because each takes
every n-th tile. With pointers a program gets one tile. With descriptors it gets many, and the loads for its next tile
overlap the epilogue of the one before.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton types compile-time parameters as constexpr, which no literal is, and its ranges as not iterable.

import triton
import triton.language as tl

from ...common.arithmetic import activation_and_derivative, rounded_product
from ...common.dropout_kernels import dropout_keep, dropout_scale

# Row tiles to visit before the next column of tiles, so that programs that run together share operands in the cache.
_GROUP_ROWS = tl.constexpr(8)

# --- pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _n_tiles(n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    return tl.cdiv(n_rows, BLOCK_ROWS) * tl.cdiv(n_cols, BLOCK_COLS)


@triton.jit
def _tile_start(tile, n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """First row and column of a tile. Tiles are numbered down a group of _GROUP_ROWS row tiles, then to the right."""
    n_row_tiles, n_col_tiles = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    tiles_per_group = _GROUP_ROWS * n_col_tiles
    first_row_tile = tile // tiles_per_group * _GROUP_ROWS
    group_rows = tl.minimum(n_row_tiles - first_row_tile, _GROUP_ROWS)
    within = tile % tiles_per_group
    return (first_row_tile + within % group_rows) * BLOCK_ROWS, within // group_rows * BLOCK_COLS


@triton.jit
def _tile_pointers(
    ptr, row, col, n_rows, n_cols, row_stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """Pointers to the tile at (row, col), and the mask of those inside the matrix (n_rows, n_cols)."""
    rows, cols = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    # The tile's offset is one scalar, so that a loop along either axis changes only that.
    start_ptr = ptr + (tl.cast(row, tl.int64) * row_stride + col)
    inside = (rows < n_rows - row)[:, None] & (cols < n_cols - col)[None, :]
    return start_ptr + (rows.to(tl.int64)[:, None] * row_stride + cols[None, :]), inside


@triton.jit
def _load_tile(
    ref, row, col, n_rows, n_cols, row_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix, zero past its end."""
    if DESCRIPTORS:
        return ref.load([row, col])
    else:
        ptrs, inside = _tile_pointers(ref, row, col, n_rows, n_cols, row_stride, BLOCK_ROWS, BLOCK_COLS)
        return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _store_tile(
    ref, tile, row, col, n_rows, n_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Store a tile into a dense matrix, in the matrix's dtype."""
    if DESCRIPTORS:
        ref.store([row, col], tile.to(ref.dtype))
    else:
        ptrs, inside = _tile_pointers(ref, row, col, n_rows, n_cols, n_cols, BLOCK_ROWS, BLOCK_COLS)
        tl.store(ptrs, tile.to(ref.dtype.element_ty), mask=inside)


@triton.jit
def _column_halves(tile, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_ROWS, 2, BLOCK_COLS // 2)), (0, 2, 1)))


@triton.jit
def _column_quarters(tile, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Split the tile into four column quarters: a whole tile of intermediates would spill registers."""
    left, right = _column_halves(tile, BLOCK_ROWS, BLOCK_COLS)
    return _column_halves(left, BLOCK_ROWS, BLOCK_COLS // 2) + _column_halves(right, BLOCK_ROWS, BLOCK_COLS // 2)


@triton.jit
def _product_quarters(
    x_ref, weight_ref, tile, x_row_stride, weight_row_stride, n_rows, n_cols, n_inner,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of x (n_rows, n_inner) @ weight (n_inner, n_cols): its first row and column, and its column quarters.

    With WEIGHT_TRANSPOSED the rows in memory are columns of weight.
    """
    row, col = _tile_start(tile, n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=ACCUMULATOR)
    for start in tl.range(0, n_inner, BLOCK_INNER):
        x = _load_tile(x_ref, row, start, n_rows, n_inner, x_row_stride, BLOCK_ROWS, BLOCK_INNER, DESCRIPTORS)
        if WEIGHT_TRANSPOSED:
            rows_of_weight = _load_tile(
                weight_ref, col, start, n_cols, n_inner, weight_row_stride, BLOCK_COLS, BLOCK_INNER, DESCRIPTORS
            )
            weight = tl.trans(rows_of_weight)
        else:
            weight = _load_tile(
                weight_ref, start, col, n_inner, n_cols, weight_row_stride, BLOCK_INNER, BLOCK_COLS, DESCRIPTORS
            )
        acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return row, col, _column_quarters(acc, BLOCK_ROWS, BLOCK_COLS)


@triton.jit
def _laid_out_as(tile, other):
    """The tile, in the registers that hold the same elements of `other`, float32 or float64.

    Otherwise triton computes what both a store and an operation with `other` need twice, in two layouts. Neither
    selects anything else: no arithmetic shift by all bits gives more than 0, which LLVM knows and triton does not.
    """
    if other.dtype == tl.float64:
        sign = other.to(tl.int64, bitcast=True) >> 63
    else:
        sign = other.to(tl.int32, bitcast=True) >> 31
    return tl.where(sign > 0, 0.0, tile)


@triton.jit
def _load_bias(bias_ptr, col, n_cols, BLOCK_COLS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    cols = tl.arange(0, BLOCK_COLS)
    return tl.load(bias_ptr + col + cols, mask=cols < n_cols - col, other=0.0).to(ACCUMULATOR)[None, :]


# --- products -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_mlp_fwd_hidden_kernel(
    x_ref, weight_ref, bias_ptr, pre_ref, hidden_ref, x_row_stride, weight_row_stride, n_rows, n_cols, n_inner,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, STORE_PRE: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden (n_rows, n_cols) = activation(pre), pre = x (n_rows, n_inner) @ weight + bias."""
    n_tiles = _n_tiles(n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row, col, quarters = _product_quarters(
            x_ref, weight_ref, tile, x_row_stride=x_row_stride, weight_row_stride=weight_row_stride,
            n_rows=n_rows, n_cols=n_cols, n_inner=n_inner,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS, BLOCK_INNER=BLOCK_INNER,
            WEIGHT_TRANSPOSED=WEIGHT_TRANSPOSED, DESCRIPTORS=DESCRIPTORS, ACCUMULATOR=ACCUMULATOR, PRECISION=PRECISION,
        )  # fmt: skip
        QUARTER: tl.constexpr = BLOCK_COLS // 4
        for i in tl.static_range(4):
            quarter_col = col + i * QUARTER
            # Apply the activation to the rounded value, because backward recomputes it from the stored one.
            pre = (quarters[i] + _load_bias(bias_ptr, quarter_col, n_cols, QUARTER, ACCUMULATOR)).to(
                bias_ptr.dtype.element_ty
            )
            hidden, _ = activation_and_derivative(pre.to(ACCUMULATOR), ACTIVATION)
            if STORE_PRE:
                _store_tile(pre_ref, pre, row, quarter_col, n_rows, n_cols, BLOCK_ROWS, QUARTER, DESCRIPTORS)
            _store_tile(hidden_ref, hidden, row, quarter_col, n_rows, n_cols, BLOCK_ROWS, QUARTER, DESCRIPTORS)


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_mlp_fwd_out_kernel(
    hidden_ref, weight_ref, bias_ptr, residual_ref, seed_ptr, out_ref,
    hidden_row_stride, weight_row_stride, residual_row_stride, n_rows, n_cols, n_inner, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (n_rows, n_cols) = residual + dropout(hidden (n_rows, n_inner) @ weight + bias)."""
    n_tiles = _n_tiles(n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row, col, quarters = _product_quarters(
            hidden_ref, weight_ref, tile, x_row_stride=hidden_row_stride, weight_row_stride=weight_row_stride,
            n_rows=n_rows, n_cols=n_cols, n_inner=n_inner,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS, BLOCK_INNER=BLOCK_INNER,
            WEIGHT_TRANSPOSED=WEIGHT_TRANSPOSED, DESCRIPTORS=DESCRIPTORS, ACCUMULATOR=ACCUMULATOR, PRECISION=PRECISION,
        )  # fmt: skip
        QUARTER: tl.constexpr = BLOCK_COLS // 4
        for i in tl.static_range(4):
            quarter_col = col + i * QUARTER
            out = quarters[i] + _load_bias(bias_ptr, quarter_col, n_cols, QUARTER, ACCUMULATOR)
            if HAS_DROPOUT:
                rows, cols = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, QUARTER)[None, :]
                keep = dropout_keep(tl.load(seed_ptr), 0, row, quarter_col, rows, cols, threshold)
                out = tl.where(keep, out * dropout_scale(threshold, ACCUMULATOR), 0.0)
            if HAS_RESIDUAL:
                residual = _load_tile(
                    residual_ref, row, quarter_col, n_rows, n_cols, residual_row_stride,
                    BLOCK_ROWS, QUARTER, DESCRIPTORS,
                )  # fmt: skip
                out += residual  # in the wider dtype of the two
            _store_tile(out_ref, out, row, quarter_col, n_rows, n_cols, BLOCK_ROWS, QUARTER, DESCRIPTORS)


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_mlp_bwd_pre_kernel(
    dproduct_ref, weight_ref, pre_ref, dpre_ref, hidden_ref, dbias_partial_ptr,
    dproduct_row_stride, weight_row_stride, n_rows, n_cols, n_inner,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, STORE_HIDDEN: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dpre (n_rows, n_cols) = (dproduct (n_rows, n_inner) @ weight) * activation'(pre), and its sum over each row tile.

    weight: the second layer's, transposed. hidden = activation(pre) is recomputed for the gradient of that weight.
    """
    n_tiles = _n_tiles(n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row, col, quarters = _product_quarters(
            dproduct_ref, weight_ref, tile, x_row_stride=dproduct_row_stride, weight_row_stride=weight_row_stride,
            n_rows=n_rows, n_cols=n_cols, n_inner=n_inner,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS, BLOCK_INNER=BLOCK_INNER,
            WEIGHT_TRANSPOSED=WEIGHT_TRANSPOSED, DESCRIPTORS=DESCRIPTORS, ACCUMULATOR=ACCUMULATOR, PRECISION=PRECISION,
        )  # fmt: skip
        QUARTER: tl.constexpr = BLOCK_COLS // 4
        for i in tl.static_range(4):
            quarter_col = col + i * QUARTER
            pre = _load_tile(pre_ref, row, quarter_col, n_rows, n_cols, n_cols, BLOCK_ROWS, QUARTER, DESCRIPTORS)
            pre = _laid_out_as(pre.to(ACCUMULATOR), quarters[i])
            hidden, derivative = activation_and_derivative(pre, ACTIVATION)
            # Rows past the end add nothing to the sum below, because their product is zero.
            dpre = rounded_product(quarters[i], derivative)
            _store_tile(dpre_ref, dpre, row, quarter_col, n_rows, n_cols, BLOCK_ROWS, QUARTER, DESCRIPTORS)
            if STORE_HIDDEN:
                _store_tile(hidden_ref, hidden, row, quarter_col, n_rows, n_cols, BLOCK_ROWS, QUARTER, DESCRIPTORS)
            cols = tl.arange(0, QUARTER)
            partial_ptrs = dbias_partial_ptr + (row // BLOCK_ROWS).to(tl.int64) * n_cols + quarter_col + cols
            tl.store(partial_ptrs, tl.sum(dpre, axis=0), mask=cols < n_cols - quarter_col)


# --- rows -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_mlp_bwd_product_kernel(
    dout_ptr, seed_ptr, dproduct_ptr, dbias_partial_ptr, dout_row_stride, n_rows, n_cols, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, STORE_DPRODUCT: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """dproduct: dout (n_rows, n_cols) after dropout's backward. Its sums over the rows of a program: partial dbias.

    A program takes BLOCK_COLS columns of every n-th tile of rows.
    """
    n_col_tiles = tl.cdiv(n_cols, BLOCK_COLS)
    first_tile, n_programs = tl.program_id(0) // n_col_tiles, tl.num_programs(0) // n_col_tiles
    col = tl.program_id(0) % n_col_tiles * BLOCK_COLS
    rows, cols = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)

    # Added up element by element, so that threads exchange sums only once.
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=ACCUMULATOR)
    for tile in range(first_tile, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        row = tile * BLOCK_ROWS
        dout = _load_tile(dout_ptr, row, col, n_rows, n_cols, dout_row_stride, BLOCK_ROWS, BLOCK_COLS, False)
        dproduct = dout.to(ACCUMULATOR)
        if HAS_DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), 0, row, col, rows[:, None], cols[None, :], threshold)
            dproduct = tl.where(keep, dproduct * dropout_scale(threshold, ACCUMULATOR), 0.0)
        sums += dproduct
        if STORE_DPRODUCT:
            _store_tile(dproduct_ptr, dproduct, row, col, n_rows, n_cols, BLOCK_ROWS, BLOCK_COLS, False)

    partial_ptrs = dbias_partial_ptr + first_tile.to(tl.int64) * n_cols + col + cols
    tl.store(partial_ptrs, tl.sum(sums, axis=0), mask=cols < n_cols - col)
