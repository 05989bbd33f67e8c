"""gelu_mlp written out, with each activation, and tensors to try it with."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import Function, assert_parity, forward, gradients, random, relayout
from fastgpt_kernels.common import dropout
from fastgpt_kernels.operations.gelu_mlp import tiles
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_fast": lambda x: 0.5 * x * (1 + torch.tanh(x * math.sqrt(2 / math.pi) * (1 + 0.044715 * x * x))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
SEED = 7
# A GPU adds up an element of a float32 product one term after the other; torch's CPU library takes several sums, which
# err less where the inner axis is long.
ONE_SUM = 2


def mlp_formula(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, activation: str = "gelu_new"
) -> Tensor:
    return ACTIVATIONS[activation](x @ fc_weight + fc_bias) @ proj_weight + proj_bias


def formula(*inputs: Tensor, activation: str = "gelu_new", dropout_p: float = 0.0) -> Tensor:
    """`mlp_formula` with the dropout of `SEED`, added to the residual where there is a sixth input."""
    out = mlp_formula(*inputs[:5], activation=activation)  # pyright: ignore
    if dropout_p > 0.0:
        rows = out.reshape(-1, out.shape[-1])
        keep, keep_scale = dropout.dropout_keep_mask((1, 1, rows.shape[0], rows.shape[1]), dropout_p, SEED, out.device)
        out = (rows * keep[0, 0] * keep_scale).view(out.shape)
    return inputs[5] + out if len(inputs) == 6 else out


def make_inputs(
    *shape: int,
    n_hidden: int,
    n_out: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    has_residual: bool = False,
) -> tuple[Tensor, ...]:
    """x with that shape, fc_weight, fc_bias, proj_weight, proj_bias, and a residual when asked for."""
    n_channels, n_out = shape[-1], n_out or shape[-1]
    tensors = [
        random(*shape),
        random(n_channels, n_hidden, seed=1) * n_channels**-0.5,
        random(n_hidden, seed=2),
        random(n_hidden, n_out, seed=3) * n_hidden**-0.5,
        random(n_out, seed=4),
    ]
    if has_residual:
        tensors.append(random(*shape[:-1], n_out, seed=6))
    return tuple(relayout(tensor.to(dtype), layout) for tensor in tensors)


def of(operations: Any, **options: Any) -> Callable[..., Tensor]:
    """gelu_mlp as a function of five inputs, or six with the residual."""
    # With partial, by which the table of accuracy finds the operation.
    return partial(_call, operations.gelu_mlp, **options)


def _call(gelu_mlp: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    return gelu_mlp(*inputs[:5], residual=inputs[5] if len(inputs) == 6 else None, seed=SEED, **options)


def assert_mlp_parity(
    operations: Any, inputs: tuple[Tensor, ...], upstream: Tensor | None = None, slack: float = 1.0, **options: Any
) -> None:
    grads = None if upstream is None else [upstream]
    assert_parity(of(operations, **options), partial(formula, **options), inputs, grads, slack=slack)


def results(function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients."""
    upstream = random(*inputs[0].shape[:-1], inputs[4].shape[0], seed=5).to(inputs[0])
    return [*forward(function, inputs), *gradients(function, inputs, [upstream])]


def several_programs(patch: pytest.MonkeyPatch) -> None:
    """Small tiles; with tensor descriptors and few programs where they can hold the matrices."""

    def tile(
        _kernel: str, _size: int, _result_size: int, _architecture: str, describable: bool, _large: bool
    ) -> tiles.ProductTile:
        return tiles.ProductTile(16, 64, 32, 4, 2, int(describable))

    patch.setattr(tiles, "product_tile", tile)
