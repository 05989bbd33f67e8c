"""The kernel of linear_cross_entropy. It runs between plain matrix products."""

# pyright: reportGeneralTypeIssues=false
# Triton 3.7 declares that some jit functions return None.

import triton
import triton.language as tl


@triton.jit
def _tile_cols(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns (LANES, VECTOR) of a tile. A lane is VECTOR neighbouring columns: 16 bytes, moved by one access."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load_logits(row_ptr, cols, n_cols, n_padded_cols, ACCUMULATOR: tl.constexpr):
    """The logits of a row at cols, -inf past its end.

    The load's mask ends at n_padded_cols, a multiple of 16 bytes. With a mask that ends at the odd vocabulary size, the
    compiler would load elements one by one.
    """
    logits = tl.load(row_ptr + cols, mask=cols < n_padded_cols, other=0.0).to(ACCUMULATOR)
    return tl.where(cols < n_cols, logits, float("-inf"))


@triton.jit
def _softmax_statistics(
    row_ptr, n_cols, n_padded_cols,
    LANES: tl.constexpr, VECTOR: tl.constexpr, HAS_SMOOTHING: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The largest logit of a row, the sum of exp(logit - largest), and for label smoothing the sum of all logits.

    Every lane keeps its own maximum and sums over the tiles, so that threads exchange nothing until the row has ended.
    """
    lane_largest = tl.full((LANES,), float("-inf"), dtype=ACCUMULATOR)
    lane_total = tl.zeros((LANES,), dtype=ACCUMULATOR)
    lane_sum = tl.zeros((LANES,), dtype=ACCUMULATOR)
    for start in range(0, n_padded_cols, LANES * VECTOR):
        cols = start + _tile_cols(LANES, VECTOR)
        logits = _load_logits(row_ptr, cols, n_cols, n_padded_cols, ACCUMULATOR)
        if HAS_SMOOTHING:
            lane_sum += tl.sum(tl.where(cols < n_cols, logits, 0.0), axis=1)
        previous = lane_largest
        lane_largest = tl.maximum(previous, tl.max(logits, axis=1))
        # A lane that has seen only -inf, past the end of the row, must not compute -inf - -inf.
        shift = tl.where(lane_largest == float("-inf"), 0.0, lane_largest)
        lane_total = lane_total * tl.exp(previous - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)

    largest = tl.max(lane_largest, axis=0)
    return largest, tl.sum(lane_total * tl.exp(lane_largest - largest), axis=0), tl.sum(lane_sum, axis=0)


@triton.jit
def _linear_cross_entropy_kernel(
    logits_ptr, label_ptr, row_scale_ptr, loss_ptr, logits_row_stride, n_cols, ignore_index,
    LANES: tl.constexpr, VECTOR: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """One program computes the loss of a row and overwrites its logits with row_scale times the gradient of the loss.

    LABEL_SMOOTHING and Z_LOSS are known to the compiler, so that a loss without them costs nothing more. As kernel
    arguments they would be rounded to float32.

    A row of logits has n_cols columns and is padded to logits_row_stride. The padding may hold anything; it is set to
    zero, because bfloat16 products on CPUs with AMX read past a row and multiply what they read by zero.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    label = tl.load(label_ptr + row)

    if (label >= 0) & (label < n_cols) & (label != ignore_index):
        target = tl.load(row_ptr + label).to(ACCUMULATOR)
        largest, total, sum_of_logits = _softmax_statistics(
            row_ptr, n_cols, logits_row_stride, LANES, VECTOR, LABEL_SMOOTHING > 0, ACCUMULATOR
        )
        # Subtract first, because largest + log(total) would round to the ulp of the largest logit.
        loss = (largest - target) + tl.log(total)
        log_sum_exp = largest + tl.log(total)
        if LABEL_SMOOTHING > 0:
            loss += LABEL_SMOOTHING * (target - sum_of_logits / n_cols)
        if Z_LOSS > 0:
            loss += Z_LOSS * log_sum_exp * log_sum_exp
        tl.store(loss_ptr + row, loss)
        if HAS_GRADIENT:
            target_col = label.to(tl.int32)
            inverse_total = 1.0 / total  # pyright: ignore[reportOperatorIssue]
            for start in range(0, logits_row_stride, LANES * VECTOR):
                cols = start + _tile_cols(LANES, VECTOR)
                logits = _load_logits(row_ptr, cols, n_cols, logits_row_stride, ACCUMULATOR)
                one_hot = tl.where(cols == target_col, 1.0, 0.0)
                probabilities = tl.exp(logits - largest) * inverse_total
                dlogits = probabilities - one_hot
                if Z_LOSS > 0:  # Not before the subtraction, whose result may be much smaller than its terms.
                    dlogits += probabilities * (2.0 * Z_LOSS * log_sum_exp)
                if LABEL_SMOOTHING > 0:
                    uniform = tl.where(cols < n_cols, 1.0 / tl.cast(n_cols, ACCUMULATOR), 0.0)
                    dlogits += LABEL_SMOOTHING * (one_hot - uniform)
                if HAS_ROW_SCALE:
                    dlogits *= tl.load(row_scale_ptr + row)
                tl.store(row_ptr + cols, dlogits.to(logits_ptr.dtype.element_ty), mask=cols < logits_row_stride)
    else:
        # No logits are read: an ignored row has a loss and gradient of zero, a label out of range gives NaN.
        constant = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, constant.to(ACCUMULATOR))
        if HAS_GRADIENT:
            for start in range(0, logits_row_stride, LANES * VECTOR):
                cols = start + _tile_cols(LANES, VECTOR)
                dlogits = tl.full((LANES, VECTOR), 0.0, dtype=tl.float32) + constant
                tl.store(row_ptr + cols, dlogits.to(logits_ptr.dtype.element_ty), mask=cols < logits_row_stride)
