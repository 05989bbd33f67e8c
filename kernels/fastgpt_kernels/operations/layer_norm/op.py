"""LayerNorm, alone or after a residual sum: public functions, launchers, autograd and registration with torch."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common import chip
from ...common.launch import (
    Launch,
    accumulator,
    as_rows,
    cdiv,
    eager_or_registered,
    is_watched,
    launching,
    triton_accumulator,
)
from ...common.second_order import formula_gradients, twice_differentiable
from . import tiles
from .kernels import _layer_norm_bwd_kernel, _layer_norm_bwd_reduce_kernel, _layer_norm_fwd_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Wider rows do not fit into the registers of one program of the backward kernel.
MAX_CHANNELS, MAX_CHANNELS_FLOAT64 = 4096, 2048


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the last axis of x to mean 0 and variance 1, then scale and shift it.

    x: (..., C) in float32, bfloat16, float16 or float64, with any strides; C at most 4096 (2048 in float64).
    weight, bias: (C,), of any of these dtypes. eps: added to the variance. dtype: of the result; None takes x's, and
    under CUDA's autocast float32, as torch does.
    Returns (..., C), dense.
    Raises ValueError when the shapes do not fit, and for wider rows or other dtypes.
    Source: Layer Normalization, arXiv 1607.06450.
    """
    _check_arguments("layer_norm", x, weight, bias)
    implementation = eager_or_registered(layer_norm_fwd, _LayerNorm, _layer_norm_op)
    return implementation(x, weight, bias, eps, dtype or _normalised_dtype(x.dtype, x.device.type))


def add_layer_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add x to the residual stream and normalise the sum.

    x, residual: (..., C). dtype: of the normalised sum. The rest as in `layer_norm`; where x and residual differ in
    dtype, their sum is promoted as torch promotes it. Without x the stream itself is normalised and returned, and the
    gradient of what reads it from there joins that of the norm in one pass over memory.
    Returns (layer_norm(x + residual), x + residual), both (..., C) and dense.
    Raises ValueError as `layer_norm` does, and when x and residual differ in shape.
    """
    if x is None:
        if is_watched() or not torch.is_grad_enabled():  # A registered operation may not return what it was given.
            return layer_norm(residual, weight, bias, eps, dtype), residual
        _check_arguments("add_layer_norm", residual, weight, bias)
        dtype = dtype or _normalised_dtype(residual.dtype, residual.device.type)
        return _NormOfStream.apply(residual, weight, bias, eps, dtype)  # type: ignore[return-value]
    if x.shape != residual.shape:
        raise ValueError(f"add_layer_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} differ in shape")
    _check_arguments("add_layer_norm", x, weight, bias, residual)
    dtype = dtype or _normalised_dtype(torch.promote_types(x.dtype, residual.dtype), x.device.type)
    implementation = eager_or_registered(add_layer_norm_fwd, _AddLayerNorm, _add_layer_norm_op)
    return implementation(x, residual, weight, bias, eps, dtype)


def supports(x: Tensor) -> bool:
    """Whether the kernels take x: its dtype is supported and its rows fit into registers."""
    return x.dtype in DTYPES and x.shape[-1] <= _max_channels(x.dtype)


def _max_channels(dtype: torch.dtype) -> int:
    return MAX_CHANNELS_FLOAT64 if dtype == torch.float64 else MAX_CHANNELS


def _check_arguments(operation: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> None:
    n_channels = x.shape[-1]
    if weight.shape != (n_channels,) or bias.shape != (n_channels,):
        raise ValueError(
            f"{operation}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be ({n_channels},), "
            f"the last axis of x {tuple(x.shape)}"
        )
    for tensor in (x, weight, bias, residual):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{operation}: no kernel for {tensor.dtype}: it takes {', '.join(map(str, DTYPES))}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{operation}: all tensors must be on {x.device}, not on {tensor.device}")
        if tensor is not None and n_channels > _max_channels(tensor.dtype):
            raise ValueError(
                f"{operation}: {n_channels} channels exceed the {_max_channels(tensor.dtype)} that the kernel takes in "
                f"{tensor.dtype}: use fastgpt_kernels.reference"
            )


def _normalised_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of y: CUDA's autocast runs layer norm in float32 and leaves float64 alone."""
    if device_type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.promote_types(dtype, torch.float32)
    return dtype


# --- launchers ------------------------------------------------------------------------------------------------------


def _dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@launching
def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor, summed: Tensor | None
) -> Iterator[Launch]:
    """Fill y, and summed where there is a residual; both are dense and have x's shape."""
    if x.numel() == 0:
        return
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    n_rows, n_cols = x.shape
    tile = tiles.layer_norm_tile("fwd", n_cols, chip.architecture(x.device))
    yield Launch(
        _layer_norm_fwd_kernel, cdiv(n_rows, tile.block_rows),
        x, residual, weight.contiguous(), bias.contiguous(), y, summed,
        x_row_stride=x.stride(0), residual_row_stride=0 if residual is None else residual.stride(0),
        n_rows=n_rows, n_cols=n_cols,
        EPS=eps, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, HAS_RESIDUAL=residual is not None,
        ACCUMULATOR=triton_accumulator((x if summed is None else summed).dtype), num_warps=tile.num_warps,
    )  # fmt: skip


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """layer_norm(x) in `dtype`."""
    y = _dense_like(x, dtype)
    _launch_forward(x, None, weight, bias, eps, y, None)
    return y


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual) in `dtype`, and x + residual."""
    y, summed = _dense_like(x, dtype), _dense_like(x, torch.promote_types(x.dtype, residual.dtype))
    _launch_forward(x, residual, weight, bias, eps, y, summed)
    return y, summed


def layer_norm_bwd(
    x: Tensor, weight: Tensor, dy: Tensor, dsum: Tensor | None, eps: float, bias_dtype: torch.dtype,
    added_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx with dsum added to it, the same in added_dtype (no elements for None), dweight and dbias."""
    dx, dadded, dweight, dbias = _new_gradients(x, weight, bias_dtype, added_dtype)
    if x.numel() == 0:
        return dx, dadded, dweight.zero_(), dbias.zero_()
    n_cols = x.shape[-1]
    tile = tiles.layer_norm_tile("bwd", n_cols, chip.architecture(x.device))
    n_programs = min(cdiv(x.numel() // n_cols, tile.block_rows), tiles.layer_norm_bwd_programs(x, tile))
    partials = x.new_empty((2, n_programs, n_cols), dtype=accumulator(x.dtype))
    _launch_backward(x, weight, dy, dsum, eps, dx, None if added_dtype is None else dadded, dweight, dbias, partials)
    return dx, dadded, dweight, dbias


def _new_gradients(
    x: Tensor, weight: Tensor, bias_dtype: torch.dtype, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dadded = x.new_empty(0) if added_dtype is None else _dense_like(x, added_dtype)
    return _dense_like(x, x.dtype), dadded, _dense_like(weight, weight.dtype), _dense_like(weight, bias_dtype)


@launching
def _launch_backward(
    x: Tensor, weight: Tensor, dy: Tensor, dsum: Tensor | None, eps: float,
    dx: Tensor, dadded: Tensor | None, dweight: Tensor, dbias: Tensor, partials: Tensor,
) -> Iterator[Launch]:  # fmt: skip
    """Fill dx and dadded, which are dense, dweight and dbias.

    partials: (2, programs, C), the sums of the last two over the rows of a program.
    """
    x, dy, dsum = as_rows(x), as_rows(dy), None if dsum is None else as_rows(dsum)
    n_rows, n_cols = x.shape
    n_programs, architecture = partials.shape[1], chip.architecture(x.device)
    tile = tiles.layer_norm_tile("bwd", n_cols, architecture)
    yield Launch(
        _layer_norm_bwd_kernel, n_programs,
        x, weight.contiguous(), dy, dsum, dx, dadded, partials[0], partials[1],
        x_row_stride=x.stride(0), dy_row_stride=dy.stride(0), dsum_row_stride=0 if dsum is None else dsum.stride(0),
        n_rows=n_rows, n_cols=n_cols,
        EPS=eps, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, HAS_DSUM=dsum is not None,
        HAS_DADDED=dadded is not None, ACCUMULATOR=triton_accumulator(x.dtype), num_warps=tile.num_warps,
    )  # fmt: skip
    yield Launch(
        _layer_norm_bwd_reduce_kernel, cdiv(n_cols, tiles.LAYER_NORM_REDUCE_COLS),
        partials[0], partials[1], dweight, dbias, n_partials=n_programs, n_cols=n_cols,
        BLOCK_PARTIALS=tiles.layer_norm_reduce_partials(architecture), BLOCK_COLS=tiles.LAYER_NORM_REDUCE_COLS,
        ACCUMULATOR=triton_accumulator(x.dtype), num_warps=tiles.LAYER_NORM_REDUCE_WARPS,
    )  # fmt: skip


# --- autograd and registration --------------------------------------------------------------------------------------

Gradients = tuple[Tensor | None, ...]


def _layer_norm_with_graph(
    x: Tensor, weight: Tensor, dy: Tensor, dsum: Tensor | None, eps: float, bias_dtype: torch.dtype,
    added_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`layer_norm_bwd` with a graph. No gradient depends on the value of the bias."""

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = accumulator(x.dtype)
        return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)

    bias = torch.zeros_like(weight, dtype=bias_dtype, requires_grad=True)
    dx, dweight, dbias = formula_gradients(formula, (x, weight, bias), dy)
    if dsum is not None:
        dx = dsum if dx is None else dx + dsum
    return dx, None if dx is None or added_dtype is None else dx.to(added_dtype), dweight, dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        _save_layer_norm(ctx, (x, weight, bias, eps, dtype), None)
        return layer_norm_fwd(x, weight, bias, eps, dtype)

    @staticmethod
    @twice_differentiable(lambda ctx, dy: _layer_norm_gradients(ctx, dy, _layer_norm_with_graph))
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        return _layer_norm_gradients(ctx, grads[0], layer_norm_bwd)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        output = add_layer_norm_fwd(x, residual, weight, bias, eps, dtype)
        _save_add_layer_norm(ctx, (x, residual, weight, bias, eps, dtype), output)
        return output

    @staticmethod
    @twice_differentiable(lambda ctx, *grads: _add_layer_norm_gradients(ctx, grads, _layer_norm_with_graph))
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return _add_layer_norm_gradients(ctx, grads, layer_norm_bwd)


class _NormOfStream(torch.autograd.Function):
    """The norm of a tensor, and the tensor, whose gradient backward adds to the norm's."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.eps, ctx.dtypes = eps, (residual.dtype, residual.dtype, bias.dtype)
        ctx.save_for_backward(residual, weight)
        ctx.set_materialize_grads(False)
        return layer_norm_fwd(residual, weight, bias, eps, dtype), residual

    @staticmethod
    @twice_differentiable(lambda ctx, *grads: _add_layer_norm_gradients(ctx, grads, _layer_norm_with_graph)[1:])
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return _add_layer_norm_gradients(ctx, grads, layer_norm_bwd)[1:]


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    x, weight, bias, eps, _ = inputs
    ctx.options = eps, bias.dtype
    ctx.save_for_backward(x, weight)


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.eps, _ = inputs
    ctx.dtypes = x.dtype, residual.dtype, bias.dtype
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _layer_norm_gradients(ctx: Any, dy: Tensor, backward: Any) -> Gradients:
    x, weight = ctx.saved_tensors
    dx, _, dweight, dbias = backward(x, weight, dy, None, *ctx.options, None)
    return dx, dweight, dbias, None, None


def _add_layer_norm_gradients(ctx: Any, grads: tuple[Tensor | None, ...], backward: Any) -> Gradients:
    (dy, dsum), (summed, weight) = grads, ctx.saved_tensors
    x_dtype, residual_dtype, bias_dtype = ctx.dtypes
    dx = dweight = dbias = None
    if dy is not None:
        in_two_dtypes = x_dtype != summed.dtype and summed.shape[-1] <= tiles.LAYER_NORM_TWO_DTYPES_COLS
        added_dtype = x_dtype if in_two_dtypes else None
        dsum, dx, dweight, dbias = backward(summed, weight, dy, dsum, ctx.eps, bias_dtype, added_dtype)
        dx = dx if in_two_dtypes else None
    if dx is None and dsum is not None:
        dx = dsum.to(x_dtype)
    return dx, None if dsum is None else dsum.to(residual_dtype), dweight, dbias, None, None


_layer_norm_op = torch.library.custom_op("fastgpt_kernels::layer_norm", layer_norm_fwd, mutates_args=())
_add_layer_norm_op = torch.library.custom_op("fastgpt_kernels::add_layer_norm", add_layer_norm_fwd, mutates_args=())
_layer_norm_backward_op = torch.library.custom_op(
    "fastgpt_kernels::layer_norm_backward", layer_norm_bwd, mutates_args=()
)


@_layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _dense_like(x, dtype)


@_add_layer_norm_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _dense_like(x, dtype), _dense_like(x, torch.promote_types(x.dtype, residual.dtype))


@_layer_norm_backward_op.register_fake
def _(
    x: Tensor, weight: Tensor, dy: Tensor, dsum: Tensor | None, eps: float, bias_dtype: torch.dtype,
    added_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _new_gradients(x, weight, bias_dtype, added_dtype)


def _layer_norm_backward(ctx: Any, dy: Tensor) -> Gradients:
    return _layer_norm_gradients(ctx, dy, _layer_norm_backward_op)


def _add_layer_norm_backward(ctx: Any, *grads: Tensor | None) -> Gradients:
    return _add_layer_norm_gradients(ctx, grads, _layer_norm_backward_op)


_layer_norm_op.register_autograd(_layer_norm_backward, setup_context=_save_layer_norm)
_add_layer_norm_op.register_autograd(_add_layer_norm_backward, setup_context=_save_add_layer_norm)

__all__ = ["add_layer_norm", "layer_norm", "supports"]
