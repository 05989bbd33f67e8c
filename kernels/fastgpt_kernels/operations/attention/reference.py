"""Causal attention in plain torch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.dropout import dropout_keep_mask


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """softmax(scale * q @ k^T) @ v, where a query sees the keys up to its own position.

    q: (B, H, Tq, D). k, v: (B, H, Tk, D) with Tk >= Tq: the queries sit at the end of the keys, so that query i sees
    keys 0 .. Tk - Tq + i. scale: D**-0.5 when None. key_padding_mask: (B, Tk) bool, True = attend.
    dropout_p: share of the attention weights that are zeroed, in units of 1/65536. seed: 64-bit integer, or a tensor
    holding one, that fixes which (see `dropout_keep_mask`); drawn from torch's generator when None.
    Returns (B, H, Tq, D). A query that sees no key gives zeros.
    Raises ValueError when shapes do not fit or dropout_p is outside [0, 1).
    Source: FlashAttention-2, arXiv 2307.08691.
    """
    check_attention_arguments(q, k, v, key_padding_mask, dropout_p)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if q.numel() == 0:
        return q.clone()
    scale = math.pow(q.shape[-1], -0.5) if scale is None else scale

    if dropout_p == 0.0 and key_padding_mask is None:
        if n_queries == 1:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        # With is_causal torch may scale scores after hiding some as -inf: scale 0 then gives NaN, a negative one +inf.
        if n_queries == n_keys and scale > 0:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True)

    visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]  # (B, 1, Tq, Tk)
        # Values at masked keys may be NaN or Inf, and zero times these is NaN.
        v = v.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        k = k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
    if dropout_p == 0.0:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        return attended if key_padding_mask is None else attended.masked_fill(~visible.any(-1, keepdim=True), 0.0)

    scores = (q @ k.transpose(-1, -2)) * scale
    # Hide with a finite number, so that a row that sees no key has finite weights, then zeroed, and finite gradients.
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~visible, 0.0)
    keep, keep_scale = dropout_keep_mask((q.shape[0], q.shape[1], n_queries, n_keys), dropout_p, seed, q.device)
    return (weights * keep * keep_scale).to(v.dtype) @ v


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, views (B, H, T, D) of the packed result (B, T, 3, H, D) of one product."""
    q, k, v = (heads.transpose(1, 2) for heads in qkv.unbind(2))
    return q, k, v


def check_attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, dropout_p: float
) -> None:
    """Raise ValueError, which names the shapes, when the arguments of `causal_attention` do not fit together."""
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "causal_attention: q must be (B, H, Tq, D) and k, v (B, H, Tk, D), "
            f"not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"causal_attention: {q.shape[2]} queries cannot sit at the end of {k.shape[2]} keys")
    if key_padding_mask is not None:
        expected = (k.shape[0], k.shape[2])
        if key_padding_mask.shape != expected or key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"causal_attention: key_padding_mask must be bool of shape {expected}, "
                f"not {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"causal_attention: dropout_p must be in [0, 1), not {dropout_p}")
