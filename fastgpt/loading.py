"""Safe, strict loading with clear errors."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


def check_config(config: PreTrainedConfig) -> None:
    """Raise ValueError when no GPT-2 can be built from this configuration."""
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
    if not config.layer_norm_epsilon > 0:
        raise ValueError(f"layer_norm_epsilon must be above 0, not {config.layer_norm_epsilon}")
    if config.activation_function not in ACT2FN:
        raise ValueError(f"unknown activation_function {config.activation_function!r}")


class LoadingMixin:
    pass
