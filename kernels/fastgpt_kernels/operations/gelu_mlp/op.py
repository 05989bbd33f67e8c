"""gelu_mlp on fused products: the public function, launchers, autograd and registration with torch.

Forward saves `pre` (N, F), the input of the activation. From it backward recomputes the hidden values, which would take
as much memory again.
Products with nothing to fuse after them are left to torch.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...common import chip
from ...common.dropout import dropout_threshold, own_seed
from ...common.launch import Launch, accumulator, cdiv, eager_or_registered, launching, triton_accumulator
from ...common.precision import as_autocast, product_precision
from ...common.second_order import formula_gradients, twice_differentiable
from . import tiles
from .kernels import (
    _gelu_mlp_bwd_pre_kernel,
    _gelu_mlp_bwd_product_kernel,
    _gelu_mlp_fwd_hidden_kernel,
    _gelu_mlp_fwd_out_kernel,
)
from .reference import check_mlp_arguments
from .reference import gelu_mlp as formula

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    activation: str = "gelu_new",
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """residual + dropout(activation(x @ fc_weight + fc_bias) @ proj_weight + proj_bias), rounded once at the end.

    x, fc_weight, fc_bias, proj_weight, proj_bias: all in float32, bfloat16, float16 or float64; autocast casts them to
    its dtype. Any strides, but a weight without a dense axis is copied first. The rest as in `reference.gelu_mlp`, with
    bitwise the same dropout.
    Returns (..., C), dense.
    Raises ValueError when shapes, dtypes or devices do not fit, and for unknown activations or other dtypes.
    Source: Language Models are Unsupervised Multitask Learners; GELU, arXiv 1606.08415.
    """
    tensors = x, fc_weight, fc_bias, proj_weight, proj_bias
    check_mlp_arguments(*tensors, activation, residual, dropout_p)
    tensors = tuple(map(as_autocast, tensors))
    _check_kernel_arguments(tensors, residual)
    drop_seed = own_seed(seed, x.device) if dropout_p > 0.0 else None
    save_pre = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    implementation = eager_or_registered(gelu_mlp_fwd, _GeluMlp, _gelu_mlp_op)
    return implementation(*tensors, residual, drop_seed, activation, dropout_p, save_pre)[0]


def supports(x: Tensor) -> bool:
    """Whether the kernels take inputs of this dtype."""
    return x.dtype in DTYPES


def _check_kernel_arguments(tensors: tuple[Tensor, ...], residual: Tensor | None) -> None:
    x = tensors[0]
    if any(tensor.dtype != x.dtype for tensor in tensors):
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ValueError(f"gelu_mlp: x, weights and biases must share one dtype, not {dtypes}")
    for tensor in (x, residual):
        if tensor is not None and not supports(tensor):
            raise ValueError(f"gelu_mlp: no kernel for {tensor.dtype}: it takes {', '.join(map(str, DTYPES))}")
    for tensor in (*tensors, residual):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"gelu_mlp: all tensors must be on {x.device}, not on {tensor.device}")


# --- launchers ------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C) with a dense last axis; N may be 0."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _weight_rows(weight: Tensor) -> tuple[Tensor, bool]:
    """A weight (in, out) as dense rows, without a copy where possible, and whether these rows are its columns."""
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        return weight.t(), True
    return (weight if weight.stride(1) == 1 else weight.contiguous()), False


def _is_describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can hold the matrix: rows start at multiples of 16 bytes and do not overlap."""
    row_stride, column_stride = matrix.stride()
    starts_aligned = matrix.data_ptr() % 16 == row_stride * matrix.element_size() % 16 == 0
    return column_stride == 1 and starts_aligned and row_stride >= matrix.shape[1]


def _product_tile(kernel: str, x: Tensor, *others: Tensor | None) -> tiles.ProductTile:
    """The tile of a kernel's product of x. others: its other matrices, the result last."""
    present = [x, *(matrix for matrix in others if matrix is not None)]
    n_rows, n_cols = present[-1].shape
    architecture, n_multiprocessors = chip.chip(x.device)
    describable = all(map(_is_describable, present))
    large = tiles.is_large_product(n_rows, n_cols, n_multiprocessors)
    return tiles.product_tile(kernel, x.element_size(), present[-1].element_size(), architecture, describable, large)


def _product(
    kernel: Any, tile: tiles.ProductTile, x: Tensor, weight: Tensor, transposed: bool,
    others: tuple[Tensor | None, ...], precision: str, **arguments: Any,
) -> Iterator[Launch]:  # fmt: skip
    """The launch of a kernel that starts with the product of x (N, K) and weight, as `_weight_rows` returns it.

    others: the pointers after these two; where programs stay resident, matrices (N, M) become descriptors.
    arguments: those of this kernel alone, with the stride of its first matrix.
    """
    n_rows, n_inner = x.shape
    n_cols = weight.shape[0 if transposed else 1]
    n_programs = cdiv(n_rows, tile.block_rows) * cdiv(n_cols, tile.block_cols)
    if n_programs == 0:
        return
    refs = x, weight, *others
    if tile.n_resident:
        n_programs = min(n_programs, chip.resident_programs(x.device, tile.n_resident))
        weight_block = [tile.block_inner, tile.block_cols]
        blocks = [[tile.block_rows, tile.block_inner], weight_block[::-1] if transposed else weight_block]
        blocks += [[tile.block_rows, tile.block_cols // 4]] * len(others)
        refs = tuple(
            TensorDescriptor.from_tensor(ref, block) if ref is not None and ref.ndim == 2 else ref
            for ref, block in zip(refs, blocks, strict=True)
        )
    yield Launch(
        kernel, n_programs, *refs, weight_row_stride=weight.stride(0), n_rows=n_rows, n_cols=n_cols, n_inner=n_inner,
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, BLOCK_INNER=tile.block_inner,
        WEIGHT_TRANSPOSED=transposed, DESCRIPTORS=tile.n_resident > 0, ACCUMULATOR=triton_accumulator(x.dtype),
        PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages, **arguments,
    )  # fmt: skip


def _dropout(seed: Tensor | None, dropout_p: float) -> dict[str, Any]:
    return {"threshold": dropout_threshold(dropout_p), "HAS_DROPOUT": seed is not None}


def _new_out(x: Tensor, proj_weight: Tensor, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(residual.dtype, x.dtype)
    return x.new_empty((*x.shape[:-1], proj_weight.shape[1]), dtype=dtype)


def _new_pre(x: Tensor, fc_weight: Tensor, save_pre: bool) -> Tensor:
    return x.new_empty((math.prod(x.shape[:-1]) if save_pre else 0, fc_weight.shape[1]))


def gelu_mlp_fwd(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    residual: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float, save_pre: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (..., C), and pre (N, F), which has no rows without save_pre."""
    out, pre = _new_out(x, proj_weight, residual), _new_pre(x, fc_weight, save_pre)
    hidden = _new_pre(x, fc_weight, True)
    _launch_forward(
        x, fc_weight, fc_bias, proj_weight, proj_bias, residual, seed, pre if save_pre else None, hidden, out,
        activation, dropout_p, product_precision(x),
    )  # fmt: skip
    return out, pre


@launching
def _launch_forward(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    residual: Tensor | None, seed: Tensor | None, pre: Tensor | None, hidden: Tensor, out: Tensor,
    activation: str, dropout_p: float, precision: str,
) -> Iterator[Launch]:  # fmt: skip
    """Fill hidden (N, F), out (..., C), and pre (N, F) if it is given."""
    rows, out = _rows(x), _rows(out)
    weight, transposed = _weight_rows(fc_weight)
    tile = _product_tile("hidden", rows, weight, pre, hidden)
    yield from _product(
        _gelu_mlp_fwd_hidden_kernel, tile, rows, weight, transposed, (fc_bias.contiguous(), pre, hidden), precision,
        x_row_stride=rows.stride(0), ACTIVATION=activation, STORE_PRE=pre is not None,
    )  # fmt: skip
    residual = None if residual is None else _rows(residual)
    weight, transposed = _weight_rows(proj_weight)
    tile = _product_tile("out", hidden, weight, residual, out)
    yield from _product(
        _gelu_mlp_fwd_out_kernel, tile, hidden, weight, transposed,
        (proj_bias.contiguous(), residual, seed, out), precision, hidden_row_stride=hidden.stride(0),
        residual_row_stride=0 if residual is None else residual.stride(0),
        HAS_RESIDUAL=residual is not None, **_dropout(seed, dropout_p),
    )  # fmt: skip


def _product_bwd(
    dout: Tensor, seed: Tensor | None, dropout_p: float, dtype: torch.dtype, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the second product (N, C) in `dtype`, and its sum over the rows, empty where it is not needed."""
    dout = _rows(dout)
    n_rows, n_cols = dout.shape
    stores = seed is not None or dout.dtype != dtype
    if not stores and not wants_bias:
        return dout, dout.new_empty(0, dtype=dtype)
    dproduct = torch.empty_like(dout, dtype=dtype, memory_format=torch.contiguous_format) if stores else dout
    tile = tiles.GELU_MLP_BWD_PRODUCT
    n_col_tiles = cdiv(n_cols, tile.block_cols)
    n_row_programs = tiles.gelu_mlp_row_programs(dout.device, cdiv(n_rows, tile.block_rows), n_col_tiles)
    partials = dout.new_empty((n_row_programs, n_cols), dtype=accumulator(dtype))
    _launch_backward_product(dout, seed, dproduct if stores else None, partials, dropout_p)
    return dproduct, partials.sum(0).to(dtype) if wants_bias else dout.new_empty(0, dtype=dtype)


@launching
def _launch_backward_product(
    dout: Tensor, seed: Tensor | None, dproduct: Tensor | None, partials: Tensor, dropout_p: float
) -> Iterator[Launch]:
    """Fill dproduct (N, C) if it is given, and partials (programs, C), its sums over the rows of a program."""
    (n_rows, n_cols), tile = dout.shape, tiles.GELU_MLP_BWD_PRODUCT
    n_programs = partials.shape[0] * cdiv(n_cols, tile.block_cols)
    yield Launch(
        _gelu_mlp_bwd_product_kernel, n_programs, dout, seed, dproduct, partials,
        dout_row_stride=dout.stride(0), n_rows=n_rows, n_cols=n_cols,
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, STORE_DPRODUCT=dproduct is not None,
        ACCUMULATOR=triton_accumulator(partials.dtype), num_warps=tile.num_warps, **_dropout(seed, dropout_p),
    )  # fmt: skip


def gelu_mlp_bwd(
    dout: Tensor, x: Tensor, fc_weight: Tensor, proj_weight: Tensor, pre: Tensor, seed: Tensor | None,
    activation: str, dropout_p: float, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, fc_weight, fc_bias, proj_weight and proj_bias; unwanted ones are empty."""
    wants_x, wants_fc_weight, wants_fc_bias, wants_proj_weight, wants_proj_bias = wants
    dproduct, dproj_bias = _product_bwd(dout, seed, dropout_p, x.dtype, wants_proj_bias)
    if not any(wants[:4]):
        return x.new_empty(0), x.new_empty(0), x.new_empty(0), x.new_empty(0), dproj_bias

    pre = pre.contiguous()  # A saved-tensor hook may have returned it in another layout.
    dpre, hidden = torch.empty_like(pre), torch.empty_like(pre) if wants_proj_weight else None
    weight, transposed = _weight_rows(proj_weight.t())
    tile = _product_tile("pre", dproduct, weight, pre, hidden, dpre)
    n_row_tiles = cdiv(dproduct.shape[0], tile.block_rows)
    partials = pre.new_empty((n_row_tiles, pre.shape[1]), dtype=accumulator(pre.dtype))
    _launch_backward_pre(
        dproduct, weight, pre, dpre, hidden, partials, transposed, tile, activation, product_precision(dproduct)
    )
    dx = torch.mm(dpre, fc_weight.t()).view(x.shape) if wants_x else x.new_empty(0)
    dfc_weight = torch.mm(_rows(x).t(), dpre) if wants_fc_weight else x.new_empty(0)
    dfc_bias = partials.sum(0).to(pre.dtype) if wants_fc_bias else x.new_empty(0)
    dproj_weight = x.new_empty(0) if hidden is None else torch.mm(hidden.t(), dproduct)
    return dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias


@launching
def _launch_backward_pre(
    dproduct: Tensor, weight: Tensor, pre: Tensor, dpre: Tensor, hidden: Tensor | None, partials: Tensor,
    transposed: bool, tile: tiles.ProductTile, activation: str, precision: str,
) -> Iterator[Launch]:  # fmt: skip
    """Fill dpre (N, F), hidden (N, F) if it is given, and partials (row tiles, F), the sums of dpre over their rows."""
    yield from _product(
        _gelu_mlp_bwd_pre_kernel, tile, dproduct, weight, transposed, (pre, dpre, hidden, partials.view(-1)), precision,
        dproduct_row_stride=dproduct.stride(0), ACTIVATION=activation, STORE_HIDDEN=hidden is not None,
    )  # fmt: skip


# --- autograd and registration --------------------------------------------------------------------------------------

Gradients = tuple[Tensor | None, ...]


class _GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = gelu_mlp_fwd(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @twice_differentiable(lambda ctx, *grads: _gradients_with_graph(ctx, grads[0]))
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        return _gradients(ctx, grads[0], gelu_mlp_bwd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, fc_weight, fc_bias, proj_weight, _, residual, seed, ctx.activation, ctx.dropout_p, _ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, fc_weight, proj_weight, output[1], seed, fc_bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, backward: Any) -> Gradients:
    if dout is None:
        return (None,) * 10
    wants = list(ctx.needs_input_grad[:5])
    grads: Gradients = (None,) * 5
    if any(wants):
        grads = backward(dout, *ctx.saved_tensors[:5], ctx.activation, ctx.dropout_p, wants)
        grads = tuple(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))
    dresidual = dout.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
    return *grads, dresidual, None, None, None, None


def _gradients_with_graph(ctx: Any, dout: Tensor | None) -> Gradients:
    if dout is None:
        return (None,) * 10
    x, fc_weight, proj_weight, _, seed, fc_bias = ctx.saved_tensors
    # No gradient depends on the values of the second bias.
    proj_bias = proj_weight.new_zeros(proj_weight.shape[1], requires_grad=ctx.needs_input_grad[4])
    options: dict[str, Any] = {} if seed is None else {"dropout_p": ctx.dropout_p, "seed": seed}
    inputs = x, fc_weight, fc_bias, proj_weight, proj_bias
    grads = formula_gradients(partial(formula, activation=ctx.activation, **options), inputs, dout)
    dresidual = dout.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
    return *grads, dresidual, None, None, None, None


_gelu_mlp_op = torch.library.custom_op("fastgpt_kernels::gelu_mlp", gelu_mlp_fwd, mutates_args=())
_gelu_mlp_backward_op = torch.library.custom_op("fastgpt_kernels::gelu_mlp_backward", gelu_mlp_bwd, mutates_args=())


@_gelu_mlp_op.register_fake
def _(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    residual: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float, save_pre: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _new_out(x, proj_weight, residual), _new_pre(x, fc_weight, save_pre)


@_gelu_mlp_backward_op.register_fake
def _(
    dout: Tensor, x: Tensor, fc_weight: Tensor, proj_weight: Tensor, pre: Tensor, seed: Tensor | None,
    activation: str, dropout_p: float, wants: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = x.shape, fc_weight.shape, fc_weight.shape[1:], proj_weight.shape, proj_weight.shape[1:]
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, wants, strict=True))


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> Gradients:
    return _gradients(ctx, dout, _gelu_mlp_backward_op)


_gelu_mlp_op.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["gelu_mlp", "supports"]
