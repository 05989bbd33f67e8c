"""linear_cross_entropy in chunks of rows: the public function, launchers, autograd and registration with torch.

Torch computes the products. Between them one kernel overwrites the logits of a chunk with the gradient of their loss,
so that the (N, V) logits never exist. For a summed loss no product is computed twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...common.launch import Launch, accumulator, is_watched, launching, triton_accumulator
from ...common.precision import autocast_dtype
from ...common.second_order import formula_gradients, twice_differentiable
from . import tiles
from .kernels import _linear_cross_entropy_kernel
from .reference import check_loss_arguments, row_losses

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows of logits start at multiples of this many elements. V = 50257 is odd: in a dense matrix, most rows could not be
# read 16 bytes at a time.
_ROW_MULTIPLE = 64


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of softmax(hidden @ weight^T) against labels; the (N, V) logits never exist at once.

    hidden: (N, C), weight: (V, C), both in float32, bfloat16, float16 or float64, with any strides; under autocast the
    logits are computed in its dtype. labels: (N,) int64. label_smoothing, z_loss: each new value compiles the kernel
    again. The rest as in `reference.linear_cross_entropy`.
    Returns a scalar, or (N,) with zeros at ignored labels for none, in float32 (float64 for float64 inputs).
    Raises ValueError when shapes, dtypes or devices do not fit, and when a label is out of range (on a GPU its loss and
    gradients are NaN instead).
    Source: Cut Your Losses, arXiv 2411.09009.
    """
    check_loss_arguments(hidden, weight, labels, reduction, ignore_index, label_smoothing, z_loss)
    dtype = _logits_dtype(hidden, weight)
    _check_kernel_arguments(hidden, weight, labels)
    if reduction == "none":
        args = hidden, weight, labels, ignore_index, label_smoothing, z_loss, dtype
        return _row_losses_op(*args) if is_watched() else _RowLosses.apply(*args)
    wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    args = hidden, weight, labels, ignore_index, label_smoothing, z_loss, dtype, *wanted
    total = _summed_loss_op(*args)[0] if is_watched() else _SummedLoss.apply(*args)
    if reduction == "sum":
        return total
    n_counted = (labels != ignore_index).sum()
    # As in torch, a batch whose labels are all ignored has gradients of zero, so that it does not spoil the weights.
    return torch.where(n_counted > 0, total / n_counted.clamp(min=1), float("nan"))


def supports(hidden: Tensor) -> bool:
    """Whether the kernel takes hidden states of this dtype."""
    return hidden.dtype in DTYPES


def _logits_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """hidden's dtype, or under autocast the dtype of a product."""
    dtype = autocast_dtype(hidden)
    if dtype is not None and weight.dtype != torch.float64:
        return dtype
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden and weight must share one dtype, not {hidden.dtype}, {weight.dtype}"
        )
    return hidden.dtype


def _check_kernel_arguments(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    for tensor in (hidden, weight):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"linear_cross_entropy: no kernel for {tensor.dtype}: it takes {', '.join(map(str, DTYPES))}"
            )
    for tensor in (weight, labels):
        if tensor.device != hidden.device:
            raise ValueError(f"linear_cross_entropy: all tensors must be on {hidden.device}, not on {tensor.device}")


# --- launchers ------------------------------------------------------------------------------------------------------


def _as_matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype and a layout that products read in place, so that it is copied once and not for every chunk."""
    x = x.to(dtype)
    return x if 1 in x.stride() else x.contiguous()


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, with the product in total's dtype; where beta is 0, total is not read."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # Torch has no such overload here. Products of half-precision values are exact in float32.
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def _gradient_buffers(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Memory for dhidden in dtype and dweight in its accumulator; no elements where a gradient is not wanted."""
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if wants_weight else (0,), dtype=accumulator(dtype)),
    )


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: torch.dtype,
    wants_hidden: bool, wants_weight: bool, row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The losses (N,) and the gradients of sum(row_scale * losses), as `_gradient_buffers` holds them."""
    dhidden, dweight = _gradient_buffers(hidden, weight, dtype, wants_hidden, wants_weight)
    hidden, weight, labels = _as_matrix(hidden, dtype), _as_matrix(weight, dtype), labels.contiguous()
    n_rows, n_cols = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(n_rows, dtype=accumulator(dtype))
    if n_rows == 0:
        return losses, dhidden, dweight.zero_()

    n_padded_cols = -(-n_cols // _ROW_MULTIPLE) * _ROW_MULTIPLE
    n_gradient_bytes = dhidden.nbytes + dweight.nbytes
    n_chunk_rows = tiles.linear_cross_entropy_chunk_rows(n_rows, n_padded_cols * dtype.itemsize, n_gradient_bytes)
    buffer = hidden.new_empty((min(n_chunk_rows, n_rows), n_padded_cols))
    for start in range(0, n_rows, n_chunk_rows):
        rows = slice(start, start + n_chunk_rows)
        hidden_rows = hidden[rows]
        padded_logits = buffer[: len(hidden_rows)]
        logits = padded_logits[:, :n_cols]
        torch.mm(hidden_rows, weight.t(), out=logits)
        scale_rows = None if row_scale is None else row_scale[rows]
        _launch_losses(
            padded_logits, labels[rows], scale_rows, losses[rows],
            n_cols, ignore_index, label_smoothing, z_loss, wants_hidden or wants_weight,
        )  # fmt: skip
        dlogits = logits  # The kernel has overwritten them.
        if wants_hidden:
            torch.mm(dlogits, weight, out=dhidden[rows])
        if wants_weight:
            _add_product(dweight, dlogits.t(), hidden_rows, beta=int(start > 0))
    return losses, dhidden, dweight


@launching
def _launch_losses(
    logits: Tensor, labels: Tensor, row_scale: Tensor | None, losses: Tensor,
    n_cols: int, ignore_index: int, label_smoothing: float, z_loss: float, has_gradient: bool,
) -> Iterator[Launch]:  # fmt: skip
    """Fill losses (rows), and overwrite the first n_cols of logits (rows, columns) by their gradient if it is wanted.

    row_scale: (rows) or None.
    """
    yield Launch(
        _linear_cross_entropy_kernel, len(logits), logits, labels, row_scale, losses,
        logits_row_stride=logits.stride(0), n_cols=n_cols, ignore_index=ignore_index,
        LANES=tiles.LINEAR_CROSS_ENTROPY_LANES, VECTOR=16 // logits.element_size(),
        LABEL_SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        HAS_GRADIENT=has_gradient, HAS_ROW_SCALE=row_scale is not None, ACCUMULATOR=triton_accumulator(logits.dtype),
        num_warps=tiles.LINEAR_CROSS_ENTROPY_WARPS,
    )  # fmt: skip


def summed_loss_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: torch.dtype,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The summed loss and its gradients, as `_gradient_buffers` holds them."""
    losses, dhidden, dweight = _losses_and_gradients(
        hidden, weight, labels, ignore_index, label_smoothing, z_loss, dtype, wants_hidden, wants_weight
    )
    return losses.sum(), dhidden, dweight


def row_losses_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The losses (N,)."""
    return _losses_and_gradients(hidden, weight, labels, ignore_index, label_smoothing, z_loss, dtype, False, False)[0]


def row_losses_bwd(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: torch.dtype,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden and dweight in the dtypes of hidden and weight, from recomputed logits."""
    unit = _power_of_two(dlosses)
    _, dhidden, dweight = _losses_and_gradients(
        hidden, weight, labels, ignore_index, label_smoothing, z_loss, dtype, wants_hidden, wants_weight,
        row_scale=dlosses / unit,
    )  # fmt: skip
    return _scaled(dhidden, unit, hidden.dtype), _scaled(dweight, unit, weight.dtype)


def _power_of_two(x: Tensor) -> Tensor:
    """A scalar: x divided by it is below 2 where finite, so that float16 holds the gradients under any loss scale."""
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    # frexp leaves the exponent of NaN and inf undefined; such a row spoils only its own gradient.
    _, exponent = torch.frexp(largest.nan_to_num(nan=1.0, posinf=1.0))
    return torch.exp2(exponent.to(x.dtype) - 1)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in dtype. The scale is not rounded to dtype: in float16 a loss scale of 65536 is infinite."""
    return torch.mul(gradient.to(scale.dtype), scale, out=gradient.new_empty(gradient.shape, dtype=dtype))


# --- autograd and registration --------------------------------------------------------------------------------------


def _with_graph(ctx: Any, dlosses: Tensor) -> list[Tensor | None]:
    """dhidden and dweight with their graph. The logits are recomputed, all rows at once."""
    hidden, weight, labels = ctx.saved_tensors[:3]
    formula = lambda hidden, weight: row_losses(hidden.to(ctx.dtype), weight, labels, *ctx.options)  # noqa: E731
    return formula_gradients(formula, (hidden, weight), dlosses)


class _SummedLoss(torch.autograd.Function):
    """The summed loss. Forward also computes its gradients, because the backward of a scalar only scales them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = summed_loss_fwd(*inputs)
        _save_summed_loss(ctx, inputs, output)
        return output[0]

    @staticmethod
    @twice_differentiable(
        lambda ctx, dtotal: (*_with_graph(ctx, dtotal.expand(len(ctx.saved_tensors[2]))), *[None] * 7)
    )
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _summed_loss_gradients(ctx, grads[0])


class _RowLosses(torch.autograd.Function):
    """A loss for every row. Only backward knows the weight of each, so it recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_row_losses(ctx, inputs, None)
        return row_losses_fwd(*inputs)

    @staticmethod
    @twice_differentiable(lambda ctx, dlosses: (*_with_graph(ctx, dlosses), *[None] * 5))
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _row_losses_gradients(ctx, grads[0], row_losses_bwd)


def _save_summed_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels, *ctx.options, ctx.dtype, wants_hidden, wants_weight = inputs
    ctx.dtypes = hidden.dtype if wants_hidden else None, weight.dtype if wants_weight else None
    ctx.save_for_backward(hidden, weight, labels, *output[1:])


def _summed_loss_gradients(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    grads = (
        None if dtype is None else _scaled(gradient, dtotal, dtype)
        for gradient, dtype in zip(ctx.saved_tensors[3:], ctx.dtypes, strict=True)
    )
    return *grads, *[None] * 7


def _save_row_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    hidden, weight, labels, *ctx.options, ctx.dtype = inputs
    ctx.save_for_backward(hidden, weight, labels)


def _row_losses_gradients(ctx: Any, dlosses: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    grads = backward(dlosses, *ctx.saved_tensors, *ctx.options, ctx.dtype, *wanted)
    return *(grad if wants else None for grad, wants in zip(grads, wanted, strict=True)), *[None] * 5


_summed_loss_op = torch.library.custom_op("fastgpt_kernels::linear_cross_entropy_sum", summed_loss_fwd, mutates_args=())
_row_losses_op = torch.library.custom_op("fastgpt_kernels::linear_cross_entropy_rows", row_losses_fwd, mutates_args=())
_row_losses_backward_op = torch.library.custom_op(
    "fastgpt_kernels::linear_cross_entropy_rows_backward", row_losses_bwd, mutates_args=()
)


@_summed_loss_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: torch.dtype,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = hidden.new_empty((), dtype=accumulator(dtype))
    return total, *_gradient_buffers(hidden, weight, dtype, wants_hidden, wants_weight)


@_row_losses_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(hidden.shape[:1], dtype=accumulator(dtype))


@_row_losses_backward_op.register_fake
def _(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: torch.dtype,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dhidden, dweight = _gradient_buffers(hidden, weight, dtype, wants_hidden, wants_weight)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype)


def _setup_summed_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save_summed_loss(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _summed_loss_backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _summed_loss_gradients(ctx, dtotal)


def _row_losses_backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    return _row_losses_gradients(ctx, dlosses, _row_losses_backward_op)


_summed_loss_op.register_autograd(_summed_loss_backward, setup_context=_setup_summed_loss)
_row_losses_op.register_autograd(_row_losses_backward, setup_context=_save_row_losses)

__all__ = ["linear_cross_entropy", "supports"]
