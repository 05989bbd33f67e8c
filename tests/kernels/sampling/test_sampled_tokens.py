"""Which token the Triton sample and its reference choose: as transformers' processors allow, and both the same."""

import math
from typing import Any

import pytest
import torch
from accuracy import LAYOUTS, relayout
from fastgpt_kernels.common import chip, dropout
from fastgpt_kernels.operations.sampling import kernels, tiles
from fastgpt_kernels.operations.sampling import op as module
from fastgpt_kernels.operations.sampling import reference as twin
from fastgpt_kernels.operations.sampling.op import sample
from fastgpt_kernels.operations.sampling.reference import SamplingOptions
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE
from transformers.generation.logits_process import MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from .formula import (
    DTYPES,
    FILTERS,
    NO_IDS,
    OVERFLOWS_ARE_RIGHT,
    PAD,
    after,
    assert_kept,
    assert_same_rows,
    draws,
    make_logits,
    make_rows,
    processors,
)

pytestmark = OVERFLOWS_ARE_RIGHT
SIZES = [1, 15, 16, 37, 131, 1000]

# --- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_vocabulary", SIZES)
def test_greedy_takes_the_largest(n_vocabulary: int, dtype: torch.dtype) -> None:
    logits = make_logits(4, n_vocabulary, dtype=dtype)
    rows = after(sample, logits, make_rows(4, n_vocabulary), SamplingOptions(top_k=3, top_p=0.5, temperature=9.0))
    assert torch.equal(rows.tokens, logits.argmax(1))


@pytest.mark.parametrize("n_vocabulary", SIZES)
def test_greedy_takes_the_first_of_equals(n_vocabulary: int) -> None:
    logits = make_logits(6, n_vocabulary, scale=1.0).round()
    logits[0], logits[1], logits[2] = 0.0, -math.inf, math.inf
    logits[3, ::2] = -0.0
    expected = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    assert torch.equal(draws(logits), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_of_logits(dtype: torch.dtype, layout: str) -> None:
    logits = make_logits(3, 131, dtype=dtype)
    for options in (SamplingOptions(), SamplingOptions(seed=1), SamplingOptions(seed=1, top_k=9, top_p=0.9)):
        expected = after(sample, logits, make_rows(3, 131), options)
        assert_same_rows(after(sample, relayout(logits, layout), make_rows(3, 131), options), expected)


@pytest.mark.parametrize("filters", [{}, {"seed": 3}, {"seed": 3, "top_k": 50}, {"seed": 3, "top_p": 0.9}])
def test_gpt2s_vocabulary(filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tiles that ship
    logits, options = make_logits(2, 50257, dtype=torch.bfloat16), SamplingOptions(**filters)
    assert_same_rows(*(after(f, logits, make_rows(2, 50257), options) for f in (sample, twin.sample)))


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("filters", FILTERS)
def test_kept_tokens_are_those_of_transformers(filters: dict[str, Any], temperature: float, dtype: torch.dtype) -> None:
    """In half precision many scores are equal."""
    options = SamplingOptions(seed=1, temperature=temperature, **filters)
    for n_vocabulary in (37, 500):
        logits = make_logits(3, n_vocabulary, dtype=dtype)
        thresholds = module.sample_fwd(logits, make_rows(3, n_vocabulary), options, None, PAD)
        assert (thresholds is None) == (not filters)
        scores = logits.float()
        assert_kept(twin.kept_tokens(scores, options), scores, options)
        if thresholds is not None:
            assert_kept(scores >= thresholds[:, None], scores, options)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("seed", [0, 2**63 + 11, -3])
def test_draws_are_the_largest_of_the_noisy_scores(seed: int, filters: dict[str, Any]) -> None:
    logits = make_logits(6, 300)
    options = SamplingOptions(seed=seed, temperature=0.7, n_continuations=3, **filters)
    rows = make_rows(6, 300)
    scores = processors(options)(NO_IDS, logits)
    continuations = torch.arange(6, device=DEVICE) % 3
    expected = (
        scores + twin.gumbel_noise(dropout.seed_tensor(seed, DEVICE), rows.positions + 1, continuations, 300)
    ).argmax(1)
    for function in (sample, twin.sample):
        assert torch.equal(after(function, logits, rows, options).tokens, expected)


@pytest.mark.parametrize("function", [sample, twin.sample])
def test_penalty_and_barred_end_tokens_are_those_of_transformers(function: Any) -> None:
    logits, eos_ids = make_logits(5, 60), torch.tensor([4, 59], device=DEVICE)
    logits[:, 4] = 50.0
    rows = make_rows(5, 60, penalty=1.7)
    assert rows.seen is not None
    options = SamplingOptions(repetition_penalty=1.7, min_length=9)
    tokens = after(function, logits, rows, options, eos_ids).tokens
    for i in range(5):
        n_tokens = int(rows.slots[i]) + 1
        ids = rows.seen[i].nonzero().T
        scores = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits[i : i + 1])  # pyright: ignore
        as_long = torch.zeros(1, n_tokens, device=DEVICE).long()
        scores = MinLengthLogitsProcessor(9, eos_ids, DEVICE)(as_long, scores)  # pyright: ignore
        assert int(tokens[i]) == int(scores.argmax())
    assert [int(token) == 4 for token in tokens] == [n + 1 >= 9 for n in rows.slots.tolist()]


@pytest.mark.parametrize("function", [sample, twin.sample])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_penalty_decides_between_tokens(filters: dict[str, Any], function: Any) -> None:
    """It brings a seen token below another that has not been seen, whichever sign its score has."""
    logits = torch.full((2, 131), -40.0, device=DEVICE)
    logits[0, [100, 3]] = torch.tensor([-5.0, -7.5], device=DEVICE)
    logits[1, [100, 3]] = torch.tensor([30.0, 20.0], device=DEVICE)
    rows = make_rows(2, 131, penalty=2.0)
    assert rows.seen is not None
    rows.seen.zero_()
    rows.seen[:, 100] = True
    options = SamplingOptions(temperature=0.1, repetition_penalty=2.0, seed=1, **filters)
    assert after(function, logits, rows, options).tokens.tolist() == [3, 3]


@pytest.mark.parametrize("function", [sample, twin.sample])
def test_the_best_token_alone_is_kept(function: Any) -> None:
    logits = make_logits(40, 131, scale=0.1)
    options = SamplingOptions(top_k=1, seed=1)
    tokens = after(function, logits, make_rows(40, 131), options).tokens
    assert torch.equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("function", [sample, twin.sample])
def test_of_equal_scores_far_apart_the_first_is_taken(function: Any) -> None:
    """Also where one thread looks at both, one after the other."""
    distance = kernels.GROUP_SIZE * tiles.sampling_choice_block(chip.architecture(torch.device(DEVICE)))
    logits = torch.zeros(1, distance + 40, device=DEVICE)
    logits[0, [17, distance + 17]] = 1.0
    assert after(function, logits, make_rows(1, distance + 40), SamplingOptions()).tokens.tolist() == [17]


@cases(60)
@given(
    n_rows=st.integers(1, 3),
    n_vocabulary=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 4.0]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 2, 7, 30, 300, 600]),
    top_p=st.sampled_from([1.0, 0.99, 0.6, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.5]),
    seed=st.sampled_from([None, 0, 2**40 + 5]),
    min_length=st.sampled_from([0, 7]),
    n_ends=st.integers(0, 3),
)
def test_random_arguments(
    n_rows: int, n_vocabulary: int, dtype: torch.dtype, scale: float, temperature: float, top_k: int, top_p: float,
    min_p: float, penalty: float, seed: int | None, min_length: int, n_ends: int,
) -> None:  # fmt: skip
    options = SamplingOptions(temperature, top_k, top_p, min_p, penalty, min_length, seed)
    logits = make_logits(n_rows, n_vocabulary, dtype=dtype, scale=scale)
    eos_ids = logits[:1].topk(min(n_ends, n_vocabulary)).indices[0] if n_ends else None
    rows = make_rows(n_rows, n_vocabulary, penalty=penalty)
    ours, theirs = (after(f, logits, rows, options, eos_ids) for f in (sample, twin.sample))
    differs = ours.tokens != theirs.tokens
    if not differs.any():
        assert_same_rows(ours, theirs)
    # Between scores as good as equal, and at the edge of top-p and min-p, rounding decides.
    scores = twin.penalised_scores(logits, rows, options, eos_ids)
    noise = twin.gumbel_noise(
        dropout.seed_tensor(seed or 0, DEVICE),
        rows.positions + 1,
        torch.arange(n_rows, device=DEVICE) * 0,
        n_vocabulary,
    )
    looser = SamplingOptions(temperature, top_k, min(1.0, top_p + 1e-5), min_p * 0.99999)
    stricter = SamplingOptions(temperature, top_k, top_p - 1e-5, min(1.0, min_p * 1.00001))
    noisy, allowed, sure = scores / temperature + noise, *(twin.kept_tokens(scores, o) for o in (looser, stricter))
    for row in differs.nonzero()[:, 0].tolist():
        token, best = int(ours.tokens[row]), noisy[row][sure[row]].max()
        assert seed is not None
        assert allowed[row, token]
        assert noisy[row, token] >= best - 1e-5 * max(1.0, float(best.abs()))
