"""LayerNorm, alone or after a residual sum, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the last axis of x to mean 0 and variance 1, then scale and shift it.

    x: (..., C). weight, bias: (C,). eps: added to the variance. dtype: of the result; None takes x's, and under CUDA's
    autocast float32.
    Returns (..., C). Raises ValueError when weight or bias is not (C,).
    Source: Layer Normalization, arXiv 1607.06450.
    """
    n_channels = x.shape[-1]
    if weight.shape != (n_channels,) or bias.shape != (n_channels,):
        raise ValueError(
            f"layer_norm: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be ({n_channels},), "
            f"the last axis of x {tuple(x.shape)}"
        )
    if x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu" and torch.is_grad_enabled():
        # On CPUs torch sums dweight and dbias in x's dtype, and bfloat16 would lose most of 8192 rows.
        return F.layer_norm(x.float(), (n_channels,), weight.float(), bias.float(), eps).to(dtype or x.dtype)
    normalised = F.layer_norm(x, (n_channels,), weight, bias, eps)
    return normalised if dtype is None else normalised.to(dtype)


def add_layer_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add x to the residual stream and normalise the sum.

    x, residual: (..., C). weight, bias: (C,). eps: added to the variance. dtype: of the normalised sum, as in
    `layer_norm`. Without x the stream itself is normalised and returned.
    Returns (layer_norm(x + residual), x + residual), both (..., C).
    Raises ValueError when the shapes differ. Source: `layer_norm`.
    """
    if x is None:
        return layer_norm(residual, weight, bias, eps, dtype), residual
    if x.shape != residual.shape:
        raise ValueError(f"add_layer_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} differ in shape")
    summed = x + residual
    return layer_norm(summed, weight, bias, eps, dtype), summed
