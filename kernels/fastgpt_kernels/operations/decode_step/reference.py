"""The decode step in plain torch, over a model's own weights: the specification, and the path for CPUs.

B batch, N new tokens per row, T slots of the cache, H heads, D head size, C channels, V vocabulary.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.activations import ACTIVATIONS
from ...common.decode_weights import DecodeWeights, Matrix, RoundedMatrix


class Multiply(Protocol):
    """residual + activation(x @ matrix + bias). x: (r, in). matrix: (in, out). bias: (out,).

    activation: a key of ACTIVATIONS, None for none. residual: (r, out). Returns (r, out).
    """

    def __call__(
        self,
        x: Tensor,
        matrix: Matrix,
        bias: Tensor | None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor: ...


def multiply(
    x: Tensor, matrix: Matrix, bias: Tensor | None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """As `Multiply`, by torch's own product."""
    matrix = matrix.to_float(x.dtype) if isinstance(matrix, RoundedMatrix) else matrix
    product = torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
    return finish(product, activation, residual)


def finish(product: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """residual + activation(product), all (r, out)."""
    product = product if activation is None else ACTIVATIONS[activation](product)
    return product if residual is None else residual + product


def head_matrix(weights: DecodeWeights) -> Matrix:
    """The head as a matrix (in, out) = (C, V)."""
    return weights.head if isinstance(weights.head, RoundedMatrix) else weights.head.t()


@torch.inference_mode()
def decode_tokens(
    weights: DecodeWeights,
    cache: Tensor,
    n_past: int,
    tokens: Tensor,
    positions: Tensor,
    attention_bias: Tensor | None = None,
    multiply: Multiply = multiply,
) -> Tensor:
    """The forward of N new tokens per row over the cache, to which their keys and values are appended.

    cache: (L, 2, B, H, T, D), keys before values; the first n_past of its T slots are filled. tokens: (B, N) int64.
    positions: (B, N) or (1, N) int64. attention_bias: (B, 1, 1, T), added to the scores; None without padding.
    multiply: computes the products.
    Returns logits (B, N, V): what follows each new token.
    """
    n_rows, n_new = tokens.shape
    new_slots = slice(n_past, n_past + n_new)
    bias = _bias_of_new_tokens(cache, n_past, n_new, attention_bias)
    head_shape = n_rows, n_new, 3, weights.n_heads, -1

    x = (F.embedding(tokens, weights.wte) + F.embedding(positions, weights.wpe)).flatten(0, 1)  # (B*N, C)
    norm_shape, eps = x.shape[1:], weights.eps
    # Views of all layers at once, because on a CPU the small operations of a step take a tenth of its time.
    news = cache[..., new_slots, :]  # (L, 2, B, H, N, D)
    keys_and_values = cache[..., : new_slots.stop, :].unbind(1)  # each (L, B, H, T, D)
    for layer, new, keys, values in zip(weights.layers, news, *keys_and_values, strict=True):
        normalised = F.layer_norm(x, norm_shape, layer.ln_1_weight, layer.ln_1_bias, eps)
        qkv = multiply(normalised, layer.qkv_weight, layer.qkv_bias)
        qkv = qkv.view(head_shape).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        new.copy_(qkv[1:])
        attended = F.scaled_dot_product_attention(qkv[0], keys, values, attn_mask=bias, scale=layer.scale)
        attended = attended.transpose(1, 2).reshape(x.shape)
        x = multiply(attended, layer.proj_weight, layer.proj_bias, residual=x)
        normalised = F.layer_norm(x, norm_shape, layer.ln_2_weight, layer.ln_2_bias, eps)
        hidden = multiply(normalised, layer.fc_weight, layer.fc_bias, weights.activation)
        x = multiply(hidden, layer.mlp_proj_weight, layer.mlp_proj_bias, residual=x)
    x = F.layer_norm(x, norm_shape, weights.ln_f_weight, weights.ln_f_bias, eps)
    return multiply(x, head_matrix(weights), None).unflatten(0, (n_rows, n_new))


def _bias_of_new_tokens(cache: Tensor, n_past: int, n_new: int, attention_bias: Tensor | None) -> Tensor | None:
    """What is added to the scores of N new tokens: (B, 1, N, T), (B, 1, 1, T), (N, T), or None for nothing."""
    n_filled = n_past + n_new
    padding = None if attention_bias is None else attention_bias[..., :n_filled]
    if n_new == 1:
        return padding
    future = cache.new_full((n_new, n_filled), -torch.inf).triu(n_past + 1)
    return future if padding is None else future + padding
