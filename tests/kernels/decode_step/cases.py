"""Decode steps on the kernels beside transformers' model in float64: how to make a case, run it and judge it."""

from dataclasses import dataclass
from typing import Any

import torch
from accuracy import assert_as_accurate, max_error
from fastgpt_kernels.operations.decode_step.op import DecodeStep
from interpreter import DEVICE
from models import look_trained, pair, tiny_config, token_ids
from torch import Tensor

import fastgpt
from fastgpt.generate import KVCache, view_weights
from fastgpt.model.compat import CACHE
from fastgpt.model.rounded import RoundedLinear

HALVES = [torch.bfloat16, torch.float16]


@dataclass
class Case:
    """Rows (B, T) of ids behind `starts` of padding, and the logits of the last n_steps columns by three models.

    eager_error: the largest of eager's own on several draws of ids.
    """

    ours: Any
    ids: Tensor
    starts: Tensor
    n_steps: int
    truth: Tensor
    eager: Tensor
    eager_error: float
    past: Any

    @property
    def n_prompt(self) -> int:
        return self.ids.shape[1] - self.n_steps


def make_case(
    dtype: torch.dtype,
    starts: list[int],
    n_tokens: int = 40,
    n_steps: int = 2,
    trained: bool = False,
    bits: int | None = None,
    rounded_head: bool = False,
    group_size: int = 64,
    **changes: Any,
) -> Case:
    theirs, ours = pair(tiny_config(**{"n_embd": 128, "n_head": 2, "n_positions": 96} | changes))
    if trained:
        theirs = look_trained(theirs)
    theirs.to(DEVICE, dtype)
    ours.load_state_dict(theirs.state_dict())
    ours.to(DEVICE, dtype)
    rounded: dict[str, Tensor] = {}
    if bits is not None:
        fastgpt.quantize(ours, bits=bits, group_size=group_size, head=rounded_head)
        products = {name: part for name, part in ours.named_modules() if isinstance(part, RoundedLinear)}
        rounded = {f"{name}.weight": product.matrix.to_float(torch.float64) for name, product in products.items()}
        if rounded_head:
            theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())  # no longer the table
            rounded["lm_head.weight"] = rounded["lm_head.weight"].t()
        theirs.load_state_dict(rounded, strict=False)
    ids = token_ids(len(starts), n_tokens, theirs.config.vocab_size).to(DEVICE)
    padding = torch.tensor(starts)
    positions = torch.arange(n_tokens)[None] - padding[:, None]
    inputs = {"attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}
    past = theirs(ids[:, :-n_steps], **{name: x[:, :-n_steps] for name, x in inputs.items()})[CACHE]

    def logits() -> list[Tensor]:
        """The logits of the ids and of three other draws, on which eager may err more."""
        draws = ((ids + n) % theirs.config.vocab_size for n in range(4))
        return [theirs(draw, **inputs).logits[:, -n_steps:] for draw in draws]

    eager = logits()
    theirs.double().load_state_dict(rounded, strict=False)
    truth = logits()
    eager_error = max(map(max_error, eager, truth))
    return Case(ours, ids, padding, n_steps, truth[0], eager[0], eager_error, past)


def filled_cache(case: Case, n_slots: int, padding: float = float("nan")) -> KVCache:
    """The prompt's keys and values as transformers computed them, and `padding` everywhere else."""
    cache = KVCache.allocate(case.ours, len(case.ids), n_slots)
    cache.memory.fill_(float("nan"))
    for memory, layer in zip(cache.memory, case.past.layers, strict=True):
        memory[:, :, :, : case.n_prompt] = torch.stack([layer.keys, layer.values])
    for row, start in enumerate(case.starts.tolist()):
        cache.memory[:, :, row, :, :start] = padding
    return cache


def decode(case: Case, cache: KVCache) -> Tensor:
    """Logits (B, n_steps, V)."""
    weights, memory = view_weights(case.ours), cache.memory
    step = DecodeStep(weights, len(case.ids), memory.shape[-2])
    for scratch in vars(step).values():
        if isinstance(scratch, Tensor):
            scratch.fill_(float("nan"))
    found = []
    for column in range(case.n_prompt, case.ids.shape[1]):
        logits = torch.full((len(case.ids), case.ours.config.vocab_size), float("nan"))
        slots = torch.full_like(case.starts, column)
        step.decode(weights, memory, case.ids[:, column].clone(), slots - case.starts, slots, case.starts, logits)
        found.append(logits)
    return torch.stack(found, 1)


def assert_case(case: Case, n_slots: int = 48, n_ulps: int = 1) -> None:
    """Logits by the factor rule; the cache changed in the slots of the new tokens alone, and there rightly."""
    cache = filled_cache(case, n_slots)
    before = cache.memory.clone()
    logits = decode(case, cache)
    dtype = case.ours.dtype
    assert_as_accurate(logits.to(dtype), case.eager, case.truth, n_ulps=n_ulps, eager_error=case.eager_error)
    n_before, n_after = case.n_prompt, case.ids.shape[1]
    for untouched in (slice(0, n_before), slice(n_after, None)):
        assert torch.equal(cache.memory[..., untouched, :].nan_to_num(7.0), before[..., untouched, :].nan_to_num(7.0))
    assert cache.memory[..., n_before:n_after, :].isfinite().all()
