"""The kernel of linear_cross_entropy. It runs between plain matrix products."""

# pyright: reportGeneralTypeIssues=false
# Triton 3.7 declares that some jit functions return None.

import triton
import triton.language as tl

from ...common.arithmetic import LOG2_E


@triton.jit
def _tile_cols(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns (LANES, VECTOR) of a tile. A lane is VECTOR neighbouring columns: 16 bytes, moved by one access."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load_logits(row_ptr, cols, n_cols, n_padded_cols, IS_TAIL: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The logits of a row at cols; in its last tile, -inf past its end.

    The load's mask ends at n_padded_cols, a multiple of 16 bytes. With a mask that ends at the odd vocabulary size, the
    compiler would load elements one by one.
    """
    if IS_TAIL:
        logits = tl.load(row_ptr + cols, mask=cols < n_padded_cols, other=0.0).to(ACCUMULATOR)
        return tl.where(cols < n_cols, logits, float("-inf"))
    else:
        return tl.load(row_ptr + cols).to(ACCUMULATOR)


@triton.jit
def _exp_of_difference(logits, largest, IS_WIDE: tl.constexpr):
    """exp(logits - largest). If not IS_WIDE, of logits in half precision, by one multiply-add and one exp2.

    That rounds largest * log2(e), and multiplies the row by a factor of 1 +- 2^-24 |largest|, far below the logits' own
    rounding. In 32 bits and more it would show.
    """
    return tl.exp2((logits - largest) * LOG2_E) if IS_WIDE else tl.exp2(logits * LOG2_E - largest * LOG2_E)


@triton.jit
def _softmax_statistics(
    row_ptr, n_cols, n_padded_cols,
    LANES: tl.constexpr, VECTOR: tl.constexpr, HAS_SMOOTHING: tl.constexpr, IS_WIDE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The largest logit of a row, the sum of exp(logit - largest), and for label smoothing the sum of all logits.

    Every lane keeps its own maximum and sums over the tiles, so that threads exchange nothing until the row has ended.
    """
    lane_largest = tl.full((LANES,), float("-inf"), dtype=ACCUMULATOR)
    lane_total = tl.zeros((LANES,), dtype=ACCUMULATOR)
    lane_sum = tl.zeros((LANES,), dtype=ACCUMULATOR)
    tail = _tail(n_cols, LANES * VECTOR)
    for IS_TAIL in tl.static_range(2):
        for start in range(tail if IS_TAIL else 0, n_padded_cols if IS_TAIL else tail, LANES * VECTOR):
            cols = start + _tile_cols(LANES, VECTOR)
            logits = _load_logits(row_ptr, cols, n_cols, n_padded_cols, IS_TAIL, ACCUMULATOR)
            if HAS_SMOOTHING:
                lane_sum += tl.sum(tl.where(cols < n_cols, logits, 0.0) if IS_TAIL else logits, axis=1)
            previous = lane_largest
            lane_largest = tl.maximum(previous, tl.max(logits, axis=1))
            # A lane that has seen only -inf, such as past the end of the row, must not compute -inf - -inf.
            shift = tl.where(lane_largest == float("-inf"), 0.0, lane_largest)
            exponentials = tl.sum(_exp_of_difference(logits, shift[:, None], IS_WIDE), axis=1)
            lane_total = lane_total * _exp_of_difference(previous, shift, IS_WIDE) + exponentials

    largest = tl.max(lane_largest, axis=0)
    total = tl.sum(lane_total * _exp_of_difference(lane_largest, largest, IS_WIDE), axis=0)
    return largest, total, tl.sum(lane_sum, axis=0)


@triton.jit
def _tail(n_cols, TILE: tl.constexpr):
    """Where the last tile of a row starts, which alone needs masks."""
    return n_cols // TILE * TILE


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
    IS_WIDE: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth >= 32
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    label = tl.load(label_ptr + row)

    if (label >= 0) & (label < n_cols) & (label != ignore_index):
        target = tl.load(row_ptr + label).to(ACCUMULATOR)
        largest, total, sum_of_logits = _softmax_statistics(
            row_ptr, n_cols, logits_row_stride, LANES, VECTOR, LABEL_SMOOTHING > 0, IS_WIDE, ACCUMULATOR
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
            scale = tl.load(row_scale_ptr + row) if HAS_ROW_SCALE else 1.0
            uniform = LABEL_SMOOTHING / tl.cast(n_cols, ACCUMULATOR)
            inverse_total = 1.0 / total  # pyright: ignore[reportOperatorIssue]
            tail = _tail(n_cols, LANES * VECTOR)
            for IS_TAIL in tl.static_range(2):
                for start in range(tail if IS_TAIL else 0, logits_row_stride if IS_TAIL else tail, LANES * VECTOR):
                    cols = start + _tile_cols(LANES, VECTOR)
                    logits = _load_logits(row_ptr, cols, n_cols, logits_row_stride, IS_TAIL, ACCUMULATOR)
                    dlogits = _exp_of_difference(logits, largest, IS_WIDE) * inverse_total
                    if Z_LOSS > 0:
                        dlogits += dlogits * (2.0 * Z_LOSS * log_sum_exp)
                    if LABEL_SMOOTHING > 0:
                        dlogits -= tl.where(cols < n_cols, uniform, 0.0) if IS_TAIL else uniform
                    if HAS_ROW_SCALE:
                        dlogits *= scale
                    dlogits = dlogits.to(logits_ptr.dtype.element_ty)
                    if IS_TAIL:
                        tl.store(row_ptr + cols, dlogits, mask=cols < logits_row_stride)
                    else:
                        tl.store(row_ptr + cols, dlogits)
            # The label's element alone has more terms: written once more, after what other threads have written.
            tl.debug_barrier()
            probability = _exp_of_difference(target, largest, IS_WIDE) * inverse_total
            dtarget = probability - 1.0
            if Z_LOSS > 0:  # Not before the subtraction, whose result may be much smaller than its terms.
                dtarget += probability * (2.0 * Z_LOSS * log_sum_exp)
            if LABEL_SMOOTHING > 0:
                dtarget += LABEL_SMOOTHING - uniform
            tl.store(row_ptr + label, (dtarget * scale).to(logits_ptr.dtype.element_ty))
    else:
        # No logits are read: an ignored row has a loss and gradient of zero, a label out of range gives NaN.
        constant = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, constant.to(ACCUMULATOR))
        if HAS_GRADIENT:
            for start in range(0, logits_row_stride, LANES * VECTOR):
                cols = start + _tile_cols(LANES, VECTOR)
                dlogits = tl.full((LANES, VECTOR), 0.0, dtype=tl.float32) + constant
                tl.store(row_ptr + cols, dlogits.to(logits_ptr.dtype.element_ty), mask=cols < logits_row_stride)
