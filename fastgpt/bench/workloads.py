"""The workloads of the benchmark: contenders with the same weights, and the work that each of them does.

A contender is "fastgpt" or a baseline: transformers' GPT-2 with eager attention, with torch's fused attention (sdpa),
or with sdpa under torch.compile and, for decoding, a static cache. Shapes: B batch, T tokens, V vocabulary.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CompileConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation.streamers import BaseStreamer

from ..accounting.shapes import ALIASES, PRESETS
from ..checkpoint.fit import rounding_of
from ..checkpoint.loading import load_without_code
from ..demo import load_demo
from ..model.patching import patch, unpatch
from ..modeling import GPT2LMHeadModel as OurModel
from .machine import seconds

WORKLOADS = ("prefill", "decode", "train")
BASELINES = ("hf-eager", "hf-sdpa", "hf-compile")
OURS = "fastgpt"

# --- models ---------------------------------------------------------------------------------------------------------


def load_base(name: str, *, random_weights: bool = False, seed: int = 0) -> tuple[GPT2LMHeadModel, str]:
    """transformers' model in float32 on the CPU, from which every contender is copied, and the origin of its weights.

    name: demo, a preset's name (weights are random: nothing is downloaded), a directory, or a Hub id.
    random_weights: take only the configuration of a directory or id. seed: of random weights.
    Returns (model, "demo" | "random" | "loaded"). Raises ValueError or OSError when there is no such GPT-2,
    and ValueError when its weights are rounded.
    """
    is_preset = ALIASES.get(name, name) in PRESETS and not Path(name).is_dir()
    if name == "demo":
        ours, weights = load_demo()[0], "demo"
    elif is_preset or random_weights:
        config = preset(name) if is_preset else load_without_code(AutoConfig, name)
        if not isinstance(config, GPT2Config):
            raise ValueError(f"{name} is not a GPT-2 (model_type {config.model_type!r}): only that runs here")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ours, weights = OurModel(config), "random"
    else:
        ours, weights = OurModel.from_pretrained(name, dtype=torch.float32), "loaded"
    if (rounding := rounding_of(ours.config)) is not None:
        raise ValueError(f"{name} has int{rounding.bits} weights: bench takes the model in floats that was rounded")
    model = unpatch(ours).float().eval()
    # Without an end token every run makes all the tokens asked for.
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model, weights


def preset(name: str) -> GPT2Config:
    """The configuration of a preset. Raises KeyError when there is none of this name."""
    shape = PRESETS[ALIASES.get(name, name)]
    return GPT2Config(
        n_layer=shape.n_layer,
        n_embd=shape.n_embd,
        n_head=shape.n_head,
        n_positions=shape.n_positions,
        vocab_size=shape.vocab_size,
        n_inner=shape.n_inner,
    )


def contender(name: str, base: GPT2LMHeadModel, device: torch.device, dtype: torch.dtype) -> GPT2LMHeadModel:
    """A copy of `base`, its configuration included, that runs as contender `name` does."""
    return as_contender(name, copy.deepcopy(base).to(device=device, dtype=dtype))  # type: ignore[call-arg]


def as_contender(name: str, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model itself, made to run as contender `name` does."""
    if name == OURS:
        return patch(model)
    model.set_attn_implementation("eager" if name == "hf-eager" else "sdpa")
    return model


# --- work -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Something to time, done by one contender.

    run: does the work once. seconds: does it once and returns the time of the part that counts. n_tokens: how many
    tokens that part processes or makes. held_bytes: bytes that the contender holds between runs, in weights, gradients
    and optimiser state. peak_growth: in place of `machine.peak_growth` of a run, if the run is in another process.
    accuracy: how far its results are from transformers' in float32, of a contender that rounds.
    """

    run: Callable[[], Any]
    seconds: Callable[[], float]
    n_tokens: int
    held_bytes: Callable[[], int]
    peak_growth: Callable[[], tuple[int | None, str]] | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)


def make_work(
    workload: str, name: str, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype
) -> Work:
    """The work of contender `name`, with its own copy of `base` on the device of ids (B, T).

    Training keeps its weights in float32 whatever the dtype.
    """
    model = contender(name, base, ids.device, torch.float32 if workload == "train" else dtype)
    if workload == "train":
        return train(name, model, ids, dtype)
    if workload == "decode":
        return decode(name, model, ids, n_new_tokens)
    return prefill(name, model, ids)


def prefill(name: str, model: GPT2LMHeadModel, ids: Tensor) -> Work:
    """A forward pass without gradients over ids (B, T), with all logits and without a cache."""
    forward: Callable[..., Any] = _compiled(model) if name == "hf-compile" else model

    @torch.no_grad()
    def run() -> Tensor:
        return forward(ids, use_cache=False).logits

    return Work(run, lambda: seconds(run, ids.device), ids.numel(), lambda: _n_bytes(model))


def decode(name: str, model: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int) -> Work:
    """Greedy generation of n_new_tokens after ids (B, T), timed from the first token, which prefill gives.

    On a CPU, a streamer reads the clock at the first token. On a GPU it would have to wait there for work that Python
    has only queued, so the time of a run that stops at the first token is subtracted instead.
    """
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if name == "hf-compile":
        options |= {"cache_implementation": "static", "compile_config": _compile_config(ids.device)}

    def generate(n_tokens: int, **more: Any) -> Tensor:
        sequences = model.generate(ids, max_new_tokens=n_tokens, **options, **more)  # type: ignore[operator]
        assert sequences.shape == (ids.shape[0], ids.shape[1] + n_tokens)
        return sequences

    def counted_seconds() -> float:
        if ids.device.type == "cuda":
            to_first_token = seconds(lambda: generate(1), ids.device)
            return seconds(lambda: generate(n_new_tokens), ids.device) - to_first_token
        clock = _TokenClock()
        generate(n_new_tokens, streamer=clock)
        return clock.times[-1] - clock.times[1]  # times[0] is the prompt's

    n_counted = ids.shape[0] * (n_new_tokens - 1)
    return Work(lambda: generate(n_new_tokens), counted_seconds, n_counted, lambda: _n_bytes(model))


class _TokenClock(BaseStreamer):
    """Records the times of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def train(name: str, model: GPT2LMHeadModel, ids: Tensor, dtype: torch.dtype) -> Work:
    """Forward with labels, backward, clipping and a fused AdamW step over ids (B, T), dropout as configured.

    model: in float32. dtype: bfloat16 runs the forward pass under autocast.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward: Callable[..., Any] = _compiled(model) if name == "hf-compile" else model

    def run() -> Tensor:
        optimizer.zero_grad()
        with autocast(ids.device, dtype):
            loss = forward(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    def held_bytes() -> int:
        state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return _n_bytes(model) + sum(tensor.nbytes for tensor in (*state, *gradients))

    return Work(run, lambda: seconds(run, ids.device), ids.numel(), held_bytes)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision with weights in float32, or none for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _compiled(model: GPT2LMHeadModel) -> Callable[..., Any]:
    config = _compile_config(model.device)
    return torch.compile(model, mode=config.mode, dynamic=False)


def _compile_config(device: torch.device) -> CompileConfig:
    config = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    # generate() compiles on GPUs only, unless it is told otherwise by this.
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def _n_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
