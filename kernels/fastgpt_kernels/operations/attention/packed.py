"""Where q, k and v are views of one packed tensor, so are their gradients: no copy has to join them.

A packed tensor is (B, T, 3, H, D), the result of one product, whose backward reads the gradient in the same layout.
"""

from typing import Any

import torch
from torch import Tensor

from .reference import split_heads


def are_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the three are views (B, H, T, D) of one dense packed tensor."""
    _, n_heads, n_tokens, head_dim = q.shape
    width = n_heads * head_dim
    strides, start = (n_tokens * 3 * width, head_dim, 3 * width, 1), q.storage_offset()
    return (
        q.shape == k.shape == v.shape
        and q.stride() == k.stride() == v.stride() == strides
        and (k.storage_offset(), v.storage_offset()) == (start + width, start + 2 * width)
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    )


class SplitHeads(torch.autograd.Function):
    """`split_heads`, whose backward copies nothing where the gradients are packed already."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(qkv)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not are_packed(dq, dk, dv):
            return torch.stack([gradient.transpose(1, 2) for gradient in (dq, dk, dv)], dim=2)
        n_batch, n_heads, n_tokens, head_dim = dq.shape
        shape = n_batch, n_tokens, 3, n_heads, head_dim
        batch_stride, head_stride, token_stride, _ = dq.stride()
        return dq.as_strided(shape, (batch_stride, token_stride, n_heads * head_dim, head_stride, 1))
