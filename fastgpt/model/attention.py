"""The attention of fastgpt as transformers calls it: the mask, and the operation that runs under it.

Importing this module registers both with transformers, so that attn_implementation="fastgpt" works on any model with
full attention. Shapes: B batch, T tokens, H heads, D head size; q for queries, k for keys.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

import fastgpt.ops as ops

from .checks import can_read
from .compat import update_options
from .patching import ATTENTION


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float, dropout_p: float
) -> Tensor:
    """Attention under any mask from `attention_mask` or a user.

    query: (B, H, Tq, D). key, value: (B, H, Tk, D). mask: (B, Tk) bool over the keys, combined with the causal mask; a
    complete mask with four axes, bool (True = attend) or additive; or None, where is_causal says whether it is causal.
    Returns (B, H, Tq, D).
    """
    if dropout_p == 1.0:  # drops every weight, whatever a mask hides; the operations divide by 1 - p
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
    if is_causal if mask is None else mask.ndim == 2:
        return ops.causal_attention(query, key, value, scale=scale, key_padding_mask=mask, dropout_p=dropout_p)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def append_to_cache(
    past: Cache, key: Tensor, value: Tensor, layer_idx: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Append key and value (B, H, T, D) to a layer of a cache. Returns all keys and values of the layer.

    options: the keyword arguments of the attention, which a user's cache may read.

    In training the first keys stay as they are. transformers joins them to an empty tensor, a copy that attention would
    then save for backward, although a training step without use_cache=False has a cache only because that is the
    default.
    """
    layer: Any = past.layers[layer_idx] if type(past) is DynamicCache and layer_idx < len(past.layers) else None
    is_first = type(layer) is DynamicLayer and not layer.is_initialized and torch.is_grad_enabled()
    if not is_first or past.offloading or (_code(past.update), _code(layer.update)) != _UPDATES:
        return past.update(key, value, layer_idx, **update_options(options))
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return key, value


def _code(method: Callable) -> Any:
    return getattr(method, "__func__", None)


_UPDATES = DynamicCache.update, DynamicLayer.update  # at import


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`attend` with the signature that transformers calls. Returns (B, Tq, H, D) and no attention weights."""
    n_queries_per_key = getattr(module, "num_key_value_groups", 1)
    if n_queries_per_key > 1:
        key, value = (heads.repeat_interleave(n_queries_per_key, dim=1) for heads in (key, value))
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
        if getattr(module, "is_cross_attention", True) is False:
            is_causal = is_causal or key.shape[2] != query.shape[2]  # then transformers always has a causal mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = attend(query, key, value, attention_mask, is_causal=is_causal, scale=scale, dropout_p=dropout)
    return attended.transpose(1, 2).contiguous(), None


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """The smallest sufficient mask: None, (B, Tk) bool over the keys of causal attention, or (B, 1, 1 or Tq, Tk) bool.

    transformers calls it with the pattern (`mask_function`) and the padding (`attention_mask`, 2-D bool).
    """
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    is_causal = mask_function is causal_mask_function and at_the_end
    if not (is_causal or mask_function is bidirectional_mask_function):
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        lengths = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **lengths, **kwargs)
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    padding = F.pad(padding, (0, kv_length - padding.shape[1]), value=False)
    if can_read(padding) and bool(padding.all()):
        return None
    return padding if is_causal else padding[:, None, None, :]


def nothing_hidden(x: Tensor) -> Tensor:
    """An empty mask that a model passes to its blocks in place of None: no padding, no packed sequences.

    Without a mask, transformers looks for packed sequences in the positions, which waits for the device, and under
    torch.compile it always makes a mask for them. A mask with four axes is passed on unchanged, and the call of a block
    replaces this one by None.
    """
    return x.new_empty((1, 1, 0, 0), dtype=torch.bool)


def is_nothing_hidden(mask: Tensor | None) -> bool:
    """Whether a mask is `nothing_hidden`."""
    return mask is not None and mask.ndim == 4 and mask.shape[-1] == 0


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, attention_mask)
