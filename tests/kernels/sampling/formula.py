"""transformers' processors, which sampling must agree with, and logits and rows to try it with."""

import math
from typing import Any

import pytest
import torch
from accuracy import random
from fastgpt_kernels.operations.sampling.op import sample
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from interpreter import DEVICE
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.1},
]
PAD = 7
# In the interpreter, where scores that lie far below the largest weigh nothing, and rows of -inf have no weight.
OVERFLOWS_ARE_RIGHT = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning") for what in ("overflow", "divide by zero")
]
NO_IDS: Any = None  # what comes before, at which these processors do not look


def make_logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0) -> Tensor:
    return (random(*shape, seed=seed) * scale).to(DEVICE, dtype)


def make_rows(n_rows: int, n_vocabulary: int, *, n_slots: int = 40, penalty: float = 1.0, n_padding: int = 2) -> Rows:
    """Rows of different lengths, the first at position 3."""
    positions = torch.arange(n_rows, device=DEVICE) % (n_slots - 8) + 3
    slots = positions + n_padding
    # A column more than there are slots, so that one written past them shows.
    sequences = torch.full((n_rows, n_slots + 1), -5, device=DEVICE)[:, :n_slots]
    seen = random(n_rows, n_vocabulary, seed=4).to(DEVICE) > 0.5 if penalty != 1.0 else None
    finished = torch.zeros(n_rows, dtype=torch.bool, device=DEVICE)
    return Rows(torch.full((n_rows,), -7, device=DEVICE), positions, slots, finished, sequences, seen)


def clone(rows: Rows) -> Rows:
    return Rows(*(None if x is None else x.clone() for x in rows))  # pyright: ignore[reportArgumentType]


def after(
    function: Any, logits: Tensor, rows: Rows, options: SamplingOptions, eos_ids: Tensor | None = None, pad: int = PAD
) -> Rows:
    """What `function` makes of rows, which stay as they are."""
    rows = clone(rows)
    function(logits, rows, options, eos_ids, pad)
    return rows


def draws(logits: Tensor, **options: Any) -> Tensor:
    """The tokens of rows that are at different positions."""
    return after(sample, logits, make_rows(len(logits), logits.shape[1]), SamplingOptions(**options)).tokens


def assert_same_rows(ours: Rows, theirs: Rows) -> None:
    pairs: Any = zip(Rows._fields, ours, theirs, strict=True)
    for name, our, their in pairs:
        assert our is their or torch.equal(our, their), f"{name}: {our}, not {their}"


def processors(options: SamplingOptions) -> LogitsProcessorList:
    """transformers' own, in its order."""
    chosen = LogitsProcessorList([TemperatureLogitsWarper(float(options.temperature))])
    if options.top_k:
        chosen.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chosen.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0:
        chosen.append(MinPLogitsWarper(options.min_p))
    return chosen


def assert_kept(kept: Tensor, scores: Tensor, options: SamplingOptions) -> None:
    """As transformers keeps, and of equal scores all; at the edge of top-p and min-p rounding decides."""
    theirs = processors(options)(NO_IDS, scores) > -math.inf
    least = scores.masked_fill(~theirs, math.inf).amin(1, keepdim=True)
    theirs = theirs | (scores == least)
    of_top_k = SamplingOptions(temperature=options.temperature, top_k=options.top_k)
    probabilities = processors(of_top_k)(NO_IDS, scores).double().softmax(1)
    above = (scores[:, :, None] < scores[:, None, :]).double() @ probabilities[:, :, None]
    share = probabilities / probabilities.amax(1, keepdim=True)
    at_edge = ((above[:, :, 0] - options.top_p).abs() < 1e-5) | ((share / max(options.min_p, 1e-30) - 1).abs() < 1e-5)
    assert not ((kept != theirs) & ~at_edge).any()
