"""The decode step in plain torch, over a model's own weights: the specification, and the path for CPUs.

B batch, N new tokens per row, T slots of the cache, H heads, D head size, C channels, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.activations import ACTIVATIONS
from ...common.decode_weights import DecodeWeights, Matrix, RoundedMatrix


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """x @ matrix + bias. x: (r, in). matrix: (in, out). bias: (out,). Returns (r, out)."""
    matrix = matrix.to_float(x.dtype) if isinstance(matrix, RoundedMatrix) else matrix
    return torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)


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
    multiply: Callable[[Tensor, Matrix, Tensor | None], Tensor] = multiply,
) -> Tensor:
    """The forward of N new tokens per row over the cache, to which their keys and values are appended.

    cache: (L, 2, B, H, T, D), keys before values; the first n_past of its T slots are filled. tokens: (B, N) int64.
    positions: (B, N) or (1, N) int64. attention_bias: (B, 1, 1, T), added to the scores; None without padding.
    multiply: computes the product of rows and a matrix.
    Returns logits (B, N, V): what follows each new token.
    """
    n_rows, n_new = tokens.shape
    new_slots = slice(n_past, n_past + n_new)
    bias = _bias_of_new_tokens(cache, n_past, n_new, attention_bias)
    activation = ACTIVATIONS[weights.activation]
    head_shape = n_rows, n_new, 3, weights.n_heads, -1

    x = (F.embedding(tokens, weights.wte) + F.embedding(positions, weights.wpe)).flatten(0, 1)  # (B*N, C)
    norm_shape, eps = x.shape[1:], weights.eps
    # Views of all layers at once, which takes fewer operations.
    news = cache[..., new_slots, :]  # (L, 2, B, H, N, D)
    keys_and_values = cache[..., : new_slots.stop, :].unbind(1)  # each (L, B, H, T, D)
    for layer, new, keys, values in zip(weights.layers, news, *keys_and_values, strict=True):
        normalised = F.layer_norm(x, norm_shape, layer.ln_1_weight, layer.ln_1_bias, eps)
        qkv = multiply(normalised, layer.qkv_weight, layer.qkv_bias)
        qkv = qkv.view(head_shape).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        new.copy_(qkv[1:])
        attended = F.scaled_dot_product_attention(qkv[0], keys, values, attn_mask=bias, scale=layer.scale)
        x += multiply(attended.transpose(1, 2).reshape(x.shape), layer.proj_weight, layer.proj_bias)
        normalised = F.layer_norm(x, norm_shape, layer.ln_2_weight, layer.ln_2_bias, eps)
        hidden = activation(multiply(normalised, layer.fc_weight, layer.fc_bias))
        x += multiply(hidden, layer.mlp_proj_weight, layer.mlp_proj_bias)
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
