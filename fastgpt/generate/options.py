"""Sampling options, their checks, and draws that a seed decides."""

import math
from collections.abc import Callable
from typing import Any

import torch
from fastgpt_kernels.common import dropout
from fastgpt_kernels.operations.sampling.reference import SamplingOptions, gumbel_noise
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process


def check_sampling_options(
    *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> None:
    """Raise ValueError, naming the value and its range, for a number that describes no distribution.

    temperature: > 0, where infinity makes all tokens alike. top_k: >= 0, where 0 keeps all tokens. top_p: >= 0, where
    0 keeps one token and 1 or more all. None leaves an option out, and what is no number is left to transformers.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be a number above 0, not {temperature} (for greedy, do not sample)")
    if isinstance(top_k, int | float) and not top_k >= 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, not {top_k}")
    if isinstance(top_p, int | float) and not top_p >= 0:
        raise ValueError(f"top_p must be 0 or more, not {top_p}")


def check_generation_options(generation_config: GenerationConfig, overrides: dict[str, Any]) -> None:
    """`check_sampling_options` on what a call of generate() asks for; options that greedy decoding ignores pass."""

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
    """The processors behind a check of the model's own logits: NaN that a processor makes is left to its maker."""
    return LogitsProcessorList([RefuseNaN(), *processors])


class Seed(LogitsProcessor):
    """Carries the `seed` of generate() to where tokens are drawn, which puts a `GumbelNoise` in its place."""

    def __init__(self, seed: int):
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, not {seed!r}")
        self.seed = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise ValueError("seed= needs plain sampling (no beams, no assistant): call torch.manual_seed instead")


class GumbelNoise(LogitsProcessor):
    """Adds noise under which the largest score is a draw from softmax(scores), and which the seed alone decides.

    The noise depends on the seed, the token's own position in its row and which of the continuations of one prompt
    the row is, so that a prompt has the same continuation alone, in a batch and behind padding.
    Gumbel noise rather than a point on the cumulative distribution: batches of different sizes round the logits
    differently, which moves every step of that distribution, but changes the largest of a few sums almost never.
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
    """The processors with noise at their end in place of a `Seed`, if there is one and the call samples.

    config: is told to take the largest of the noisy scores. mask: (B, T), 0 at padding, or None.
    """
    seeds = [processor for processor in processors if isinstance(processor, Seed)]
    processors = LogitsProcessorList(processor for processor in processors if not isinstance(processor, Seed))
    if seeds and config.do_sample:
        n_padding = 0 if mask is None else (mask == 0).sum(1)
        processors.append(GumbelNoise(seeds[0].seed, n_padding, config.num_return_sequences or 1))
        config.do_sample = False
    return processors


# The processors that the engine knows, in the order in which its sampling kernel stands in for them, and the options
# under which it does what they do.
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
    """What the sampling kernel has to do in place of processors; None when it cannot do the same.

    Without a seed one is drawn from torch's generator, and rows of equal prompts get noise of their own.
    """
    found = [processor for processor in processors if not isinstance(processor, RefuseNaN)]
    if not all(map(_is_on_device, found)):
        return None
    places = [ON_DEVICE.index(type(processor)) for processor in found]
    if places != sorted(set(places)):
        return None
    options: dict[str, Any] = {}
    for processor in found:
        option = _OPTIONS[type(processor)](processor)
        for name in options.keys() & option:  # min_length, of which there are two
            option[name] = max(options[name], option[name])
        options |= option
    if do_sample and "seed" not in options:
        options |= {"seed": int(torch.randint(2**63 - 1, ())), "n_continuations": n_rows}
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
    """Which of the V tokens a repetition penalty holds against each row of a prompt, (B, V); None without a penalty."""
    for processor in processors:
        if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
            n_ignored = torch.as_tensor(
                0 if processor.prompt_ignore_length is None else processor.prompt_ignore_length, device=ids.device
            ).view(-1, 1)
            ignored = torch.arange(ids.shape[1], device=ids.device) < n_ignored
            seen = torch.zeros(len(ids), n_tokens + 1, dtype=torch.bool, device=ids.device)
            return seen.scatter_(1, ids.masked_fill(ignored, n_tokens), True)[:, :-1].contiguous()
    return None
