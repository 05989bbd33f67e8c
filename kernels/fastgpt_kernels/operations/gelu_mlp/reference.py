"""The MLP in plain torch."""

import torch
from torch import Tensor

from ...common.activations import ACTIVATIONS
from ...common.dropout import dropout_keep_mask


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
    """residual + dropout(activation(x @ fc_weight + fc_bias) @ proj_weight + proj_bias).

    x: (..., C). fc_weight: (C, F), fc_bias: (F,), proj_weight: (F, C), proj_bias: (C,): (in, out), as Conv1D stores
    them. activation: a key of `ACTIVATIONS`. residual: has the result's shape; None adds nothing.
    dropout_p: share of the elements that are zeroed, in multiples of 1/65536. seed: 64-bit integer, or a tensor
    holding one, that fixes which (`dropout_keep_mask` of (1, 1, N, C)); drawn from torch's generator when None.
    Returns (..., C), in the dtype to which residual and the product promote.
    Raises ValueError on an unknown activation, when the shapes do not fit and when dropout_p is outside [0, 1).
    Source: Language Models are Unsupervised Multitask Learners; GELU, arXiv 1606.08415.
    """
    check_mlp_arguments(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, residual, dropout_p)
    rows = x.reshape(-1, x.shape[-1])
    hidden = ACTIVATIONS[activation](torch.addmm(fc_bias, rows, fc_weight))  # (N, F)
    out = torch.addmm(proj_bias, hidden, proj_weight)  # (N, C)
    if dropout_p > 0.0:
        keep, keep_scale = dropout_keep_mask((1, 1, out.shape[0], out.shape[1]), dropout_p, seed, out.device)
        out = out * keep[0, 0] * keep_scale
    out = out.view(*x.shape[:-1], proj_weight.shape[1])
    return out if residual is None else residual + out


def check_mlp_arguments(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    activation: str,
    residual: Tensor | None,
    dropout_p: float,
) -> None:
    """Raise ValueError, which names what does not fit, for arguments that `gelu_mlp` cannot take."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"gelu_mlp: unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    n_hidden, n_out = proj_weight.shape[0], proj_weight.shape[-1]
    if (fc_weight.shape, fc_bias.shape) != ((x.shape[-1], n_hidden), (n_hidden,)) or proj_bias.shape != (n_out,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, fc_weight, fc_bias, proj_weight, proj_bias))
        raise ValueError(f"gelu_mlp: x must be (..., C), the rest (C, F), (F,), (F, C) and (C,), not {shapes}")
    if residual is not None and residual.shape != (*x.shape[:-1], n_out):
        expected = *x.shape[:-1], n_out
        raise ValueError(f"gelu_mlp: residual must be {expected}, not {tuple(residual.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"gelu_mlp: dropout_p must be in [0, 1), not {dropout_p}")
