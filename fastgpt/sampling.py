"""Sampling options and their checks."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor


def check_sampling_options(
    *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> None:
    """Raise ValueError, naming the value and its range, for an option that describes no distribution.

    temperature: > 0. top_k: >= 0, where 0 keeps all tokens. top_p: in (0, 1]. None leaves an option out.
    """
    if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a finite number above 0, not {temperature} (for greedy, do not sample)")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")


def check_generation_options(generation_config: GenerationConfig, overrides: dict[str, Any]) -> None:
    """`check_sampling_options` on what a call of generate() asks for; options that greedy decoding ignores pass."""

    def option(name: str) -> Any:
        return overrides[name] if name in overrides else getattr(generation_config, name, None)

    if option("do_sample"):
        check_sampling_options(temperature=option("temperature"), top_k=option("top_k"), top_p=option("top_p"))


class RefuseNaN(LogitsProcessor):
    """Raise ValueError when a model's logits are NaN, rather than sample from them."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and bool(scores.isnan().any()):
            raise ValueError("the model's logits are NaN: check its weights (fastgpt verify DIR) and its dtype")
        return scores
