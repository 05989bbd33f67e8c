"""The static cache of keys and values, and how a prompt gets into it: through the model's own blocks.

B batch, T slots of the cache, L layers, H heads, D head size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer

from ..model.compat import CACHE

P = ParamSpec("P")
R = TypeVar("R")


def without_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """A function or generator that runs without gradients and outside inference mode, whatever its caller's mode is.

    What is allocated in inference mode cannot be written to outside of it, and the engine writes to what it allocates
    in later steps and calls.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


@dataclass
class KVCache:
    """Keys and values of every layer, allocated once.

    memory: (L, 2, B, H, T, D), keys before values; the first n_tokens of T are filled.
    hidden: (B, 1, 1, T), what is added to the scores: -inf at padding, 0 elsewhere; None where there is no padding.
    """

    memory: Tensor
    hidden: Tensor | None = None
    n_tokens: int = 0

    @classmethod
    def allocate(cls, model: GPT2LMHeadModel, n_rows: int, n_slots: int) -> "KVCache":
        config, wte = model.config, model.transformer.wte.weight
        shape = config.n_layer, 2, n_rows, config.n_head, n_slots, config.n_embd // config.n_head
        return cls(wte.new_empty(shape))

    def copy_to(self, cache: DynamicCache) -> None:
        """Append what is filled to an empty cache of transformers'."""
        for layer, (keys, values) in enumerate(self.memory[..., : self.n_tokens, :]):
            cache.update(keys, values, layer)


class _PromptLayer(DynamicLayer):
    """A layer of transformers' cache that writes the prompt into a KVCache and gives it back from there."""

    def __init__(self, memory: Tensor):
        super().__init__()
        self.memory = memory  # (2, B, H, T, D)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.memory[..., : key_states.shape[-2], :]
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        self.is_initialized = True
        return self.keys, self.values


def prefill(model: GPT2LMHeadModel, cache: KVCache, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Run a prompt through the model's own blocks and keep its keys and values.

    ids: (B, T). mask: (B, T), 0 at the padding on the left; None when there is none. positions: (B, T) or (1, T).
    Fills the empty cache. Returns logits (B, V) of what follows. Raises as the model's forward does.
    """
    past = Cache(layers=[_PromptLayer(memory) for memory in cache.memory])
    inputs = {"attention_mask": mask, "position_ids": positions, CACHE: past}
    outputs = model(ids, **inputs, use_cache=True, logits_to_keep=1)
    cache.n_tokens = ids.shape[1]
    if mask is not None:
        padding = F.pad(mask == 0, (0, cache.memory.shape[-2] - ids.shape[1]))  # (B, T)
        cache.hidden = cache.memory.new_zeros(padding.shape).masked_fill_(padding, -torch.inf)[:, None, None, :]
        # A weight of zero would not silence a NaN that padding may have left.
        cache.memory.masked_fill_(padding[:, None, :, None], 0.0)
    return outputs.logits[:, -1]
