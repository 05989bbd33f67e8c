"""layer_norm and add_layer_norm written out, and tensors to try them with."""

from functools import partial
from typing import Any

import torch
from accuracy import Function, assert_parity, random, relayout
from torch import Tensor


def layer_norm_formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered * centered).mean(-1, keepdim=True)
    return centered / (variance + eps).sqrt() * weight + bias


def add_layer_norm_formula(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return layer_norm_formula(summed, weight, bias, eps), summed


def make_inputs(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """x with that shape, weight and bias."""
    x = relayout((2 * random(*shape) + 0.5).to(dtype), layout)
    return x, (1 + random(shape[-1], seed=1)).to(dtype), random(shape[-1], seed=2).to(dtype)


def make_tensor(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    return relayout(random(*shape, seed=seed).to(dtype), layout)


def make_sum_inputs(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and the residual with that shape, weight and bias."""
    x, weight, bias = make_inputs(*shape, dtype=dtype, layout=layout)
    return x, make_tensor(*shape, seed=4, dtype=dtype, layout=layout), weight, bias


def of(operations: Any, inputs: tuple[Tensor, ...] | list[Tensor]) -> Function:
    """layer_norm for (x, weight, bias), add_layer_norm for (x, residual, weight, bias)."""
    return operations.layer_norm if len(inputs) == 3 else operations.add_layer_norm


def assert_layer_norm_parity(
    operations: Any, inputs: tuple[Tensor, ...], layout: str = "contiguous", slack: float = 1.0, **options: float
) -> None:
    """Parity of layer_norm or add_layer_norm, as `of` chooses. layout: of the gradients."""
    x, formula = inputs[0], layer_norm_formula if len(inputs) == 3 else add_layer_norm_formula
    upstream = [make_tensor(*x.shape, seed=99 + i, dtype=x.dtype, layout=layout) for i in range(len(inputs) - 2)]
    functions = partial(of(operations, inputs), **options), partial(formula, **options)
    assert_parity(*functions, inputs, upstream, slack=slack)
