"""The output of a training step: transformers' own, with logits that exist only if someone reads them."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions


class LazyLogits:
    """Logits (B, T, V) that are computed when first read, under the autocast in force where this was made."""

    def __init__(self, lm_head: nn.Module, hidden_states: Tensor):
        device_type = hidden_states.device.type
        self.lm_head, self.hidden_states = lm_head, hidden_states
        self.autocast = torch.autocast(
            device_type,
            dtype=torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
        )

    def compute(self) -> Tensor:
        with self.autocast:
            return self.lm_head(self.hidden_states)


class CausalLMOutput(CausalLMOutputWithCrossAttentions):
    """The output of a training step whose loss was computed without logits: reading them computes them.

    `output.logits`, `output["logits"]`, `output.get("logits")`, indexing and `to_tuple()` give what transformers
    gives; `items()` and `values()` hold the `LazyLogits` until then.
    """

    def __getattribute__(self, name: str):
        value = super().__getattribute__(name)
        if name == "logits" and isinstance(value, LazyLogits):
            self.logits = value = value.compute()
        return value

    def __getitem__(self, key):
        _ = self.logits if key == "logits" else None
        return super().__getitem__(key)

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default

    def to_tuple(self) -> tuple:
        _ = self.logits
        return super().to_tuple()
