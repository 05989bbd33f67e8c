"""The forward of the newest tokens of every row in torch's operations, over the model's own weights.

B batch, N new tokens per row, T slots of the cache, H heads, D head size, C channels, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache
from .weights import Weights


def decode_one_token(weights: Weights, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """`decode_tokens` for one token per row. tokens: (B,). positions: (B,) or (1,). Returns logits (B, V)."""
    return decode_tokens(weights, cache, tokens[:, None], positions[:, None])[:, 0]


@torch.inference_mode()
def decode_tokens(weights: Weights, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """The forward of N tokens per row over the cache, to which their keys and values are appended.

    tokens: (B, N). positions: (B, N) or (1, N). Returns logits (B, N, V), of what follows each of them.
    """
    n_rows, n_new = tokens.shape
    here = slice(cache.n_tokens, cache.n_tokens + n_new)
    filled = slice(here.stop)
    hidden = _hidden_from(cache, n_new)
    head_shape = n_rows, n_new, 3, weights.n_heads, -1

    x = (F.embedding(tokens, weights.wte) + F.embedding(positions, weights.wpe)).flatten(0, 1)  # (B*N, C)
    for layer, memory in zip(weights.layers, cache.memory, strict=True):
        qkv = layer.qkv(layer.ln_1(x)).view(head_shape).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        memory[..., here, :] = qkv[1:]
        keys, values = memory[..., filled, :]  # each (B, H, T, D)
        attended = F.scaled_dot_product_attention(qkv[0], keys, values, attn_mask=hidden, scale=layer.scale)
        x += layer.attn_proj(attended.transpose(1, 2).reshape(x.shape))
        x += layer.mlp_proj(layer.activation(layer.fc(layer.ln_2(x))))
    cache.n_tokens = here.stop
    return _head(weights.ln_f(x), weights.head).unflatten(0, (n_rows, n_new))


def _hidden_from(cache: KVCache, n_new: int) -> Tensor | None:
    """What is added to the scores of N new tokens, (B, 1, N, T) or without its first axes; None where nothing is."""
    n_filled = cache.n_tokens + n_new
    padding = None if cache.hidden is None else cache.hidden[..., :n_filled]
    if n_new == 1:
        return padding
    later = cache.memory.new_full((n_new, n_filled), -torch.inf).triu(cache.n_tokens + 1)
    return later if padding is None else later + padding


def _head(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T. x: (B, C). weight: (V, C)."""
    n_rows = x.shape[0]
    if x.device.type == "cpu" and n_rows == 1:
        return torch.mv(weight, x[0])[None]  # 1.4 times as fast in bfloat16, the same in float32
    if x.device.type == "cpu" and (n_rows >= 8 or x.dtype == torch.bfloat16):
        return torch.mm(
            weight, x.t()
        ).t()  # 1.3 to 1.5 times as fast in bfloat16; in float32 1.5 with 8 rows, 0.5 with 2
    return F.linear(x, weight)
