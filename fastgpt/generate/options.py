"""Sampling options, their checks, and draws that depend on a seed alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from fastgpt_kernels.common import dropout
from fastgpt_kernels.operations.sampling.reference import SamplingOptions, gumbel_noise
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

# float32 holds every logit of a model, up to 1e8, divided by this.
LEAST_TEMPERATURE = 1e-30


def check_sampling_options(
    *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> None:
    """Raise ValueError, with the value and its range, for a number that describes no distribution.

    temperature: at least `LEAST_TEMPERATURE`, where infinity makes all tokens equally likely. top_k: >= 0, where 0
    keeps all tokens. top_p: >= 0, where 0 keeps one token and 1 or more all. None leaves an option out; transformers
    checks what is no number.
    """
    if isinstance(temperature, int | float) and not temperature >= LEAST_TEMPERATURE:
        least = "a number above 0" if not temperature > 0 else f"{LEAST_TEMPERATURE} or more"
        raise ValueError(f"temperature must be {least}, not {temperature} (for greedy, do not sample)")
    if isinstance(top_k, int | float) and not top_k >= 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, not {top_k}")
    if isinstance(top_p, int | float) and not top_p >= 0:
        raise ValueError(f"top_p must be 0 or more, not {top_p}")


def check_generation_options(generation_config: GenerationConfig, overrides: dict[str, Any]) -> None:
    """`check_sampling_options` on the options of a generate() call; those that greedy decoding ignores pass."""

    def option(name: str) -> Any:
        return overrides[name] if name in overrides else getattr(generation_config, name, None)

    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
        if option(name) is not None and option(name) < 1:
            raise ValueError(f"{name} must be 1 or more, not {option(name)}")
    if option("do_sample"):
        check_sampling_options(temperature=option("temperature"), top_k=option("top_k"), top_p=option("top_p"))


NAN_LOGITS = "the model's logits are NaN: check its weights (fastgpt verify DIR) and its dtype"


class RefuseNaN(LogitsProcessor):
    """Raise ValueError when a model's logits are NaN, rather than sample from them."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and bool(scores.isnan().any()):
            raise ValueError(NAN_LOGITS)
        return scores


def refusing_nan(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors, after a check for NaN in the model's own logits. NaN from a processor is not checked."""
    return LogitsProcessorList([RefuseNaN(), *processors])


class Seed(LogitsProcessor):
    """Carries the `seed` of generate() to `settle_seed`, which replaces it by `GumbelNoise`."""

    def __init__(self, seed: int):
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, not {seed!r}")
        self.seed = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise ValueError("seed= needs plain sampling (no beams, no assistant): call torch.manual_seed instead")


class GumbelNoise(LogitsProcessor):
    """Adds seeded Gumbel noise: the largest noisy score is a draw from softmax(scores).

    The noise depends on the seed, the position of the token without padding, and the number of the row among the
    continuations of its prompt. So a prompt has the same continuation alone, in a batch and after padding.
    Gumbel noise is used and not inversion of the cumulative distribution, because batches of different sizes round the
    logits differently: this shifts every bound of the cumulative distribution, but almost never the largest sum.
    """

    def __init__(self, seed: int, n_padding: Tensor | int = 0, n_continuations: int = 1):
        self.seed, self.n_padding, self.n_continuations = seed, n_padding, n_continuations

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        n_rows, n_tokens = input_ids.shape
        rows = torch.arange(n_rows, device=scores.device)
        positions = n_tokens - self.n_padding + torch.zeros_like(rows)
        seed = dropout.seed_tensor(self.seed, scores.device)
        return scores + gumbel_noise(seed, positions, rows % self.n_continuations, scores.shape[1])


def settle_seed(processors: LogitsProcessorList, config: GenerationConfig, mask: Tensor | None) -> LogitsProcessorList:
    """The processors, with `GumbelNoise` at their end in place of a `Seed` if the call samples.

    config: do_sample is set to False, which takes the largest noisy score. mask: (B, T), 0 at padding, or None.
    """
    seeds = [processor for processor in processors if isinstance(processor, Seed)]
    processors = LogitsProcessorList(processor for processor in processors if not isinstance(processor, Seed))
    if seeds and config.do_sample:
        n_padding = 0 if mask is None else (mask == 0).sum(1)
        processors.append(GumbelNoise(seeds[0].seed, n_padding, config.num_return_sequences or 1))
        config.do_sample = False
    return processors


# The processors that the sampling kernel can replace, in the order in which it applies them, and the options of the
# kernel that do the same.
_OPTIONS: dict[type[LogitsProcessor], Callable[[Any], dict[str, Any]]] = {
    logits_process.RepetitionPenaltyLogitsProcessor: lambda p: {"repetition_penalty": p.penalty},
    logits_process.MinLengthLogitsProcessor: lambda p: {"min_length": p.min_length},
    logits_process.MinNewTokensLengthLogitsProcessor: lambda p: {
        "min_length": p.prompt_length_to_skip + p.min_new_tokens
    },
    logits_process.TemperatureLogitsWarper: lambda p: {"temperature": float(p.temperature)},
    logits_process.TopKLogitsWarper: lambda p: {"top_k": p.top_k},
    logits_process.TopPLogitsWarper: lambda p: {"top_p": float(p.top_p)},
    logits_process.MinPLogitsWarper: lambda p: {"min_p": float(p.min_p)},
    GumbelNoise: lambda p: {"seed": p.seed, "n_continuations": p.n_continuations},
}
ON_DEVICE = tuple(_OPTIONS)


def device_options(
    processors: LogitsProcessorList, do_sample: bool, n_rows: int, device: torch.device
) -> SamplingOptions | None:
    """The processors as options of the sampling kernel; None when it cannot do the same.

    Without a seed, one is drawn from torch's generator, and every row gets noise of its own.
    """
    found = [processor for processor in processors if not isinstance(processor, RefuseNaN)]
    if not all(map(_is_on_device, found)):
        return None
    order = [ON_DEVICE.index(type(processor)) for processor in found]
    if order != sorted(set(order)):
        return None
    options: dict[str, Any] = {}
    for processor in found:
        option = _OPTIONS[type(processor)](processor)
        for name in options.keys() & option:  # only min_length, which two processors set
            option[name] = max(options[name], option[name])
        options |= option
    if do_sample and "seed" not in options:
        options |= {"seed": int(torch.randint(2**63 - 1, (), device="cpu")), "n_continuations": n_rows}
    if "seed" in options:
        options["seed"] = dropout.seed_tensor(options["seed"], device)
    try:
        return SamplingOptions(**options)
    except ValueError:  # an infinite temperature, a top_p of 0
        return None


def _is_on_device(processor: LogitsProcessor) -> bool:
    kind = type(processor)
    keeps_one = kind is logits_process.TopKLogitsWarper or getattr(processor, "min_tokens_to_keep", 1) == 1
    return kind in _OPTIONS and keeps_one and getattr(processor, "filter_value", -math.inf) == -math.inf


def seen_tokens(processors: LogitsProcessorList, ids: Tensor, n_tokens: int) -> Tensor | None:
    """(B, V) bool: the tokens of each prompt that the repetition penalty acts on; None without a penalty."""
    for processor in processors:
        if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
            n_ignored = torch.as_tensor(
                0 if processor.prompt_ignore_length is None else processor.prompt_ignore_length, device=ids.device
            ).view(-1, 1)
            ignored = torch.arange(ids.shape[1], device=ids.device) < n_ignored
            seen = torch.zeros(len(ids), n_tokens + 1, dtype=torch.bool, device=ids.device)
            return seen.scatter_(1, ids.masked_fill(ignored, n_tokens), True)[:, :-1].contiguous()
    return None
