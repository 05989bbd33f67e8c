"""The noise of the Triton sample and its reference, and that it draws tokens with their exact probabilities."""

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastgpt_kernels.operations.sampling import kernels
from fastgpt_kernels.operations.sampling import reference as twin
from fastgpt_kernels.operations.sampling.op import sample
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from interpreter import DEVICE, INTERPRETING
from torch import Tensor

from .formula import (
    FILTERS,
    NO_IDS,
    OVERFLOWS_ARE_RIGHT,
    after,
    assert_same_rows,
    draws,
    make_logits,
    make_rows,
    processors,
)

pytestmark = OVERFLOWS_ARE_RIGHT

# --- noise and distribution -----------------------------------------------------------------------------------------


@triton.jit
def _noise_kernel(word_ptr, noise_ptr, n_words, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    word = tl.load(word_ptr + index, mask=index < n_words, other=0).to(tl.uint32)
    tl.store(noise_ptr + index, kernels._noise_of_words(word), mask=index < n_words)


def test_noise_is_finite_and_exact_for_every_word() -> None:
    near_an_end = torch.arange(64)
    words = torch.cat([
        near_an_end, 2**32 - 1 - near_an_end, 2**29 + near_an_end, 2**32 - 2**29 - near_an_end,
        torch.randint(2**32, (2000,), generator=torch.Generator().manual_seed(0), device="cpu"),
    ]).to(DEVICE)  # fmt: skip
    noise = torch.full(words.shape, math.nan, device=DEVICE)
    _noise_kernel[(1,)](words, noise, len(words), BLOCK=4096)  # pyright: ignore
    exact = -(-((words.double() + 0.5) * 2.0**-32).log()).log()
    assert noise.isfinite().all()
    assert (noise.double() - exact).abs().max() < 4e-6
    assert noise.max() > 22.8
    assert noise.min() < -3.1


def test_noise_is_that_of_the_reference() -> None:
    """But for a unit in the last place, in which logarithms of numpy, torch and GPUs differ."""
    words = torch.randint(2**32, (4096,), generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE)
    noise = torch.full(words.shape, math.nan, device=DEVICE)
    _noise_kernel[(1,)](words, noise, len(words), BLOCK=4096)  # pyright: ignore
    expected = twin.noise_of_words(words)
    torch.testing.assert_close(noise, expected, rtol=2e-7, atol=5e-7)


def test_a_seed_draws_the_same_tokens_on_both_paths() -> None:
    """Over many draws from a vocabulary with many tokens of nearly equal weight."""
    n_draws = 120 if INTERPRETING else 20_000
    logits = make_logits(n_draws, 500, scale=0.5)
    rows = make_rows(n_draws, 500, n_slots=1000)
    for filters in ({}, {"top_k": 50}):
        options = SamplingOptions(seed=7, temperature=0.8, n_continuations=n_draws, **filters)
        ours, theirs = (after(f, logits, rows, options).tokens for f in (sample, twin.sample))
        assert torch.equal(ours, theirs)


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """By how many standard deviations the frequencies miss the probabilities (V,); none may fall on a zero."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = len(tokens) * probabilities[possible]
    statistic, freedom = ((counts[possible] - expected) ** 2 / expected).sum().item(), int(possible.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_k": 9, "top_p": 0.9}, {"min_p": 0.2}])
@pytest.mark.parametrize(("function", "n_draws"), [(sample, 100 if INTERPRETING else 10**5), (twin.sample, 10**5)])
def test_frequencies_are_the_probabilities(function: Any, n_draws: int, filters: dict[str, Any]) -> None:
    logits, options = make_logits(1, 20, scale=1.0), SamplingOptions(seed=7, temperature=1.3, **filters)
    rows = make_rows(n_draws, 20)
    rows.positions.copy_(torch.arange(n_draws))
    tokens = after(function, logits.expand(n_draws, 20), rows, options).tokens
    scores = processors(options)(NO_IDS, logits)[0].double()
    assert abs(chi_square(tokens, scores.softmax(0))) < 4
    assert chi_square(tokens, (3 * scores).softmax(0)) > 4  # so this test can fail


@pytest.mark.parametrize("filters", FILTERS)
def test_a_seed_gives_the_same_tokens_alone_and_anywhere_in_a_batch(filters: dict[str, Any]) -> None:
    logits = make_logits(8, 131)
    rows, options = make_rows(8, 131), SamplingOptions(seed=5, **filters)
    first = after(sample, logits, rows, options)
    assert_same_rows(after(sample, logits, rows, options), first)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4], device=DEVICE)
    shuffled = Rows(*(None if x is None else x[order] for x in rows))  # pyright: ignore[reportArgumentType]
    assert torch.equal(after(sample, logits[order], shuffled, options).tokens, first.tokens[order])
    for i in (0, 5):
        alone = Rows(*(None if x is None else x[i : i + 1] for x in rows))  # pyright: ignore[reportArgumentType]
        assert torch.equal(after(sample, logits[i : i + 1], alone, options).tokens, first.tokens[i : i + 1])


def test_noise_differs_by_seed_position_and_continuation() -> None:
    logits, rows = torch.zeros(6, 200, device=DEVICE), make_rows(6, 200)
    rows.positions.copy_(torch.tensor([3, 3, 3, 4, 4, 4]))

    def tokens(**options: Any) -> list[int]:
        return after(sample, logits, rows, SamplingOptions(**options)).tokens.tolist()

    assert [len(set(tokens(seed=1, n_continuations=n))) for n in (1, 2, 3)] == [2, 4, 6]
    assert tokens(seed=1) == tokens(seed=torch.tensor([1], device=DEVICE))
    assert tokens(seed=2**64 - 1) == tokens(seed=-1) != tokens(seed=1)
    assert tokens(seed=1) != tokens(seed=1 + 2**32)


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e6, 1e300])
@pytest.mark.parametrize("filters", FILTERS)
def test_extreme_temperatures(filters: dict[str, Any], temperature: float) -> None:
    logits = make_logits(4, 131)
    tokens = draws(logits, seed=2, temperature=temperature, **filters)
    assert ((tokens >= 0) & (tokens < 131)).all()
    if temperature < 1:
        assert torch.equal(tokens, logits.argmax(1))
