"""Training step after step: the loss strays from a float64 run no further than transformers' own does."""

import copy
import math
from typing import Any

import pytest
import torch
from models import pair, tiny_config, token_ids
from torch import Tensor

import fastgpt

SEEDS = (0, 1, 2)
# How much further than transformers' attention that strays most, over all seeds: rounding errors grow as training goes
# on, by a factor that depends on the seed and the processor.
FACTOR = 2.0


def batches(seed: int, n_rows: int = 4, n_tokens: int = 24) -> list[Tensor]:
    return [token_ids(n_rows, n_tokens, 131, seed=10 * seed + i) for i in range(8)]


def losses(model: Any, ids: list[Tensor], n_steps: int) -> Tensor:
    """(n_steps,) losses of AdamW with clipping, the batches in turn."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, weight_decay=0.1)
    history = []
    for step in range(n_steps):
        loss = model(ids[step % len(ids)], labels=ids[step % len(ids)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return torch.tensor(history, dtype=torch.float64)


def deviations(config: Any, ids: list[Tensor], n_steps: int, dtype: torch.dtype) -> tuple[float, float]:
    """Root mean square of what the losses of fastgpt and of transformers lack of those in float64."""
    theirs, ours = pair(config)
    truth = losses(copy.deepcopy(theirs).double(), ids, n_steps)
    assert truth[-len(ids) :].mean() < 0.9 * truth[: len(ids)].mean(), "nothing was learned"
    found = [(losses(ours.to(dtype), ids, n_steps) - truth).square().mean().sqrt().item()]
    for attention in ("sdpa", "eager"):
        model = copy.deepcopy(theirs).to(dtype)
        model.set_attn_implementation(attention)
        found.append((losses(model, ids, n_steps) - truth).square().mean().sqrt().item())
    return found[0], max(found[1:])


def assert_strays_no_further(found: list[tuple[float, float]]) -> None:
    """By the geometric mean over the seeds."""
    ours, theirs = (math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*found, strict=True))
    assert ours <= FACTOR * theirs


@pytest.mark.parametrize(("dtype", "n_steps"), [(torch.float32, 200), (torch.bfloat16, 60)])
def test_losses_of_a_training_run(dtype: torch.dtype, n_steps: int) -> None:
    assert_strays_no_further([deviations(tiny_config(), batches(seed), n_steps, dtype) for seed in SEEDS])


def test_losses_of_a_training_run_on_kernels() -> None:
    config = tiny_config(n_layer=1, n_embd=32, n_head=2)
    with fastgpt.backend("triton"):
        found = [deviations(config, batches(seed, 1, 12)[:2], 20, torch.float32) for seed in SEEDS[:1]]
    assert_strays_no_further(found)


def test_losses_with_dropout_have_the_same_distribution() -> None:
    """At fixed weights: mean and spread of the loss over random masks."""
    n_draws = 400
    theirs, ours = pair(tiny_config(n_layer=1, embd_pdrop=0.1, resid_pdrop=0.2, attn_pdrop=0.3))
    ids = token_ids(2, 12, 131)
    drawn = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        drawn.append(torch.tensor([model(ids, labels=ids).loss.item() for _ in range(n_draws)], dtype=torch.float64))
    (mean, spread), (our_mean, our_spread) = ((x.mean(), x.std()) for x in drawn)
    assert spread > 0.005, "nothing was dropped"
    assert abs(our_mean - mean) < 4 * spread * math.sqrt(2 / n_draws)
    # The standard error of a standard deviation is about spread / sqrt(2 n).
    assert abs(our_spread - spread) < 5 * spread / math.sqrt(n_draws)
