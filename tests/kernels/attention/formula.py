"""causal_attention written out, and tensors to try it with."""

from functools import partial
from typing import Any

import torch
from accuracy import Function, assert_parity, forward, gradients, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.common import dropout
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # of the kernels
MASKS = ["none", "left", "right", "holes", "all"]


def attention_formula(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    query_position = torch.arange(n_queries)[:, None] + n_keys - n_queries
    visible = (torch.arange(n_keys) <= query_position).expand(q.shape[0], 1, n_queries, n_keys)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
        k, v = (torch.where(key_padding_mask[:, None, :, None], t, 0.0) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    highest = (
        torch.where(visible, scores, -torch.inf).amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min).detach()
    )
    exponentials = torch.where(visible, (torch.where(visible, scores, highest) - highest).exp(), 0.0)
    weights = exponentials / exponentials.sum(-1, keepdim=True).clamp(min=0.5)  # at least 1 where a key is seen
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def dropped_formula(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float | None, dropout_p: float, seed: int
) -> Tensor:
    """`attention_formula` with the weights that `dropout.dropout_keep_mask` drops set to zero."""
    if dropout_p == 0.0:
        return attention_formula(q, k, v, scale=scale, key_padding_mask=mask)
    n_keys = k.shape[2]
    identity = torch.eye(n_keys, dtype=q.dtype).expand(*q.shape[:2], n_keys, n_keys)
    weights = attention_formula(q, k, identity, scale=scale, key_padding_mask=mask)
    keep, keep_scale = dropout.dropout_keep_mask((*q.shape[:3], n_keys), dropout_p, seed, q.device)  # pyright: ignore
    return torch.einsum("bhqk,bhkd->bhqd", weights * keep * keep_scale, v)


def make_inputs(
    n_batch: int,
    n_heads: int,
    n_queries: int,
    n_keys: int,
    head_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    lengths = (n_queries, n_keys, n_keys)
    tensors = [random(n_batch, n_heads, n, head_size, seed=seed) for seed, n in enumerate(lengths)]
    q, k, v = (relayout(x.to(dtype), layout) for x in tensors)
    return q, k, v


def make_mask(kind: str, n_batch: int, n_keys: int) -> Tensor | None:
    """(B, Tk), True = attend. In every kind but "all" each sequence has something to attend to."""
    if kind == "none":
        return None
    position = torch.arange(n_keys).expand(n_batch, n_keys)
    n_hidden = (torch.arange(n_batch)[:, None] + 1) * n_keys // (n_batch + 1)
    if kind == "left":
        return position >= n_hidden
    if kind == "right":
        return position < n_keys - n_hidden
    if kind == "holes":
        return (position * 7 + torch.arange(n_batch)[:, None]) % 3 != 1
    return torch.zeros(n_batch, n_keys, dtype=torch.bool)


def assert_attention_parity(
    operations: Any,
    inputs: tuple[Tensor, ...],
    upstream: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    slack: float = 1.0,
    terms_cancel: bool = False,
) -> None:
    """The reference has more slack, because torch's own fused attention errs up to three times as much as eager."""
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": 3}
    attention = partial(operations.causal_attention, key_padding_mask=mask, **options)
    slack = max(slack, 3) if operations is reference else slack
    grads = None if upstream is None else [upstream]
    formula = partial(dropped_formula, mask=mask, **options)
    assert_parity(attention, formula, inputs, grads, slack=slack, terms_cancel=terms_cancel)


def outputs_and_gradients(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    upstream = random(*inputs[0].shape, seed=5).to(inputs[0])
    return *forward(function, inputs), *gradients(function, inputs, [upstream])
