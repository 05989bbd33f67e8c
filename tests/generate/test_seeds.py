"""A seed gives always the same tokens, whatever batch a prompt is in."""

from typing import Any

import pytest
import torch
from fastgpt_kernels.common import dropout
from fastgpt_kernels.operations.sampling.reference import gumbel_noise
from models import pair, tiny_config, token_ids
from prompts import left_padded, ragged
from torch import Tensor
from transformers import StoppingCriteriaList

GREEDY = {"do_sample": False, "eos_token_id": None}
THE_ENGINE = "generate: the engine"


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 20, "top_p": 0.9, "temperature": 1.3}], ids=str)
def test_a_seed_gives_the_same_tokens_for_every_batch_size(options: dict) -> None:
    _, ours = pair(tiny_config(n_positions=96))
    prompts = ragged(8, 131)
    options = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": None} | options

    def run(rows: list[int], seed: int = 5, **more) -> list[list[int]]:
        inputs = left_padded([prompts[row] for row in rows])
        return ours.generate(**inputs, **options, **more, seed=seed)[:, -40:].tolist()

    batch = run(list(range(8)))
    assert run(list(range(8))) == batch
    assert [run([row])[0] for row in range(8)] == batch
    assert run([6, 1]) == [batch[6], batch[1]]
    assert run([0], seed=6)[0] != batch[0]
    several = run([2], num_return_sequences=3)
    assert several[0] == batch[2]
    assert len({tuple(row) for row in several}) == 3
    assert run([2], stopping_criteria=StoppingCriteriaList([lambda ids, scores: torch.zeros(len(ids)).bool()])) == [
        batch[2]
    ], "transformers' loop draws other tokens"


def test_a_seed_continues_where_it_stopped() -> None:
    _, ours = pair(tiny_config(n_positions=96))
    options = {"do_sample": True, "eos_token_id": None, "seed": 2**63 + 1}
    ids = token_ids(1, 5, 131)
    whole = ours.generate(ids, max_new_tokens=30, **options)
    assert ours.generate(whole[:, :20], max_new_tokens=15, **options).tolist() == whole.tolist()


def test_seeded_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws against the exact probabilities, and draws at two positions are independent."""
    n_draws, n_tokens = 20_000, 13
    scores = torch.linspace(-2, 2, n_tokens).expand(n_draws, -1)
    seeds_apart = torch.arange(n_draws)

    def draw(seed: int) -> Tensor:
        words = dropout.seed_tensor(seed, seeds_apart.device)
        noise = gumbel_noise(words, seeds_apart, torch.zeros_like(seeds_apart), n_tokens)
        return (scores + noise).argmax(1)

    expected = n_draws * scores[0].double().softmax(0)
    draws = draw(1)
    for sample in (draws, draw(-(2**63))):
        chi_square = ((sample.bincount(minlength=n_tokens) - expected).square() / expected).sum()
        assert chi_square < 32.9  # 0.1% of fair samples are above, at 12 degrees of freedom
    joint = expected.outer(expected) / n_draws
    pairs = (draws[:-1] * n_tokens + draws[1:]).bincount(minlength=n_tokens**2).view(n_tokens, n_tokens)
    assert ((pairs - joint).square() / joint).sum() < 228  # the same at 168 degrees


@pytest.mark.parametrize("seed", [1.5, "1", True, 2**64, -(2**63) - 1])
def test_seed_that_is_not_64_bits(seed: Any) -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits"):
        ours.generate(token_ids(1, 3, 131), seed=seed, do_sample=True, max_new_tokens=2)


def test_seed_with_beams_is_refused() -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match="seed= needs plain sampling"):
        ours.generate(token_ids(1, 3, 131), seed=1, num_beams=2, max_new_tokens=2)
