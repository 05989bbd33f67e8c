"""The Triton sample and its reference against transformers' processors, exact probabilities and each other."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from accuracy import LAYOUTS, random, relayout
from fastgpt_kernels.common import chip, dropout
from fastgpt_kernels.operations.sampling import kernels, tiles
from fastgpt_kernels.operations.sampling import op as module
from fastgpt_kernels.operations.sampling import reference as twin
from fastgpt_kernels.operations.sampling.filter_kernels import _sampling_filtered_choice_kernel
from fastgpt_kernels.operations.sampling.op import sample, supports
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE, INTERPRETING, check_overflow, dry_run, shuffled_grid
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

# In the interpreter, where scores that lie far below the largest weigh nothing, and rows of -inf have no weight.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning") for what in ("overflow", "divide by zero")
]
only_interpreted = pytest.mark.skipif(not INTERPRETING, reason="a GPU is here: kernels run on it")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 16, 37, 131, 1000]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.1},
]
PAD = 7
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


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SAMPLING_GROUPS", 4)
    monkeypatch.setattr(tiles, "SAMPLING_CHOICE_BLOCK", 256)
    monkeypatch.setattr(tiles, "SAMPLING_FILTER_LANES", 64)
    monkeypatch.setattr(tiles, "SAMPLING_WAYS", 16)


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
    n_draws = 200 if INTERPRETING else 20_000
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


# --- what becomes of the rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [sample, twin.sample])
@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"seed": 1, "top_k": 3}])
def test_rows_move_on(options: dict[str, Any], function: Any) -> None:
    logits = make_logits(4, 37, scale=0.0)
    for row, token in enumerate((3, 9, 20, 36)):
        logits[row, token] = 1e5
    before = make_rows(4, 37, penalty=2.0)
    before.finished[1] = True
    before.slots[2], before.slots[3] = 38, 39  # the last of 40 slots, and one behind it
    eos_ids = torch.tensor([5, 20], device=DEVICE)
    rows = after(function, logits, before, SamplingOptions(repetition_penalty=2.0, **options), eos_ids)
    assert rows.tokens.tolist() == [3, PAD, 20, 36]
    assert rows.finished.tolist() == [False, True, True, False]
    assert torch.equal(rows.positions, before.positions + 1)
    assert torch.equal(rows.slots, before.slots + 1)
    sequences = before.sequences.clone()
    sequences[0, before.slots[0] + 1], sequences[1, before.slots[1] + 1], sequences[2, 39] = 3, PAD, 20
    assert torch.equal(rows.sequences, sequences)
    assert before.seen is not None
    seen = before.seen.clone()
    seen[[0, 1, 2, 3], [3, PAD, 20, 36]] = True
    assert torch.equal(rows.seen, seen)  # pyright: ignore


def test_a_pad_token_outside_the_vocabulary_marks_nothing() -> None:
    before = make_rows(2, 37, penalty=2.0)
    before.finished[:] = True
    for pad in (-1, 37, 50256):
        options = SamplingOptions(repetition_penalty=2.0)
        rows = after(sample, make_logits(2, 37), before, options, pad=pad)
        assert rows.tokens.tolist() == [pad, pad]
        assert torch.equal(rows.seen, before.seen)  # pyright: ignore


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("function", [sample, twin.sample])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("filters", [{"seed": None}, *({"seed": 4} | filters for filters in FILTERS)])
def test_not_a_number_is_told_and_stays_in_its_row(filters: dict[str, Any], penalty: float, function: Any) -> None:
    options = SamplingOptions(repetition_penalty=penalty, **filters)
    logits, before = make_logits(4, 131), make_rows(4, 131, penalty=penalty)
    expected = after(function, logits, before, options)
    logits[1, 130], logits[3] = math.nan, math.nan
    before.finished[3] = True
    rows = after(function, logits, before, options)
    assert rows.tokens[1] == -1
    assert rows.tokens[3] == PAD
    assert rows.finished.tolist() == [False, True, False, True]
    assert torch.equal(rows.tokens[::2], expected.tokens[::2])
    if rows.seen is not None:
        assert torch.equal(rows.seen[1], before.seen[1])  # pyright: ignore


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("filters", [{"seed": None}, *({"seed": 4} | filters for filters in FILTERS)])
def test_infinite_logits(filters: dict[str, Any]) -> None:
    logits = make_logits(3, 131)
    logits[0], logits[1, 30], logits[2, 5:] = -math.inf, math.inf, -math.inf
    options = SamplingOptions(**filters)
    tokens = after(sample, logits, make_rows(3, 131), options).tokens
    assert tokens[:2].tolist() == [0, 30]
    assert tokens[2] < 5
    assert torch.equal(tokens, after(twin.sample, logits, make_rows(3, 131), options).tokens)


# --- order and overflow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", FILTERS)
def test_bug_results_depend_on_the_order_of_programs(filters: dict[str, Any]) -> None:
    logits, rows, options = make_logits(5, 131), make_rows(5, 131, penalty=1.3), SamplingOptions(1.1, seed=3, **filters)
    options = SamplingOptions(1.1, repetition_penalty=1.3, seed=3, **filters)
    first = after(sample, logits, rows, options)
    for seed in range(3):
        with shuffled_grid(seed):
            assert_same_rows(after(sample, logits, rows, options), first)


@only_interpreted
@pytest.mark.parametrize("filters", FILTERS)
def test_no_arithmetic_overflows_in_use(filters: dict[str, Any]) -> None:
    with check_overflow():
        draws(make_logits(3, 131), seed=2**64 - 1, **filters)
        draws(make_logits(3, 131, scale=1e38), seed=2**64 - 1, **filters)


# B * V >= 2**33 elements that no machine needs to hold: (rows, columns, stride of a row).
@only_interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(("n_rows", "n_cols", "stride"), [(2**23, 1000, 1024), (2**27, 64, 64), (2**11, 37, 2**22)])
def test_bug_offsets_overflow(n_rows: int, n_cols: int, stride: int) -> None:
    n_groups = -(-n_cols // 16)
    x, index, flag = torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    state: Any = (index,) * 5 + (index, flag)
    shared: Any = {"seen_row_stride": stride, "n_cols": n_cols, "n_groups": n_groups, "N_EOS": 1, "HAS_PENALTY": True}
    scoring: Any = {
        "logits_row_stride": stride, "penalty": 2.0, "inverse_temperature": 1.0, "min_length": 3, "n_continuations": 2,
    }  # fmt: skip
    groups_kernel: Any = kernels._sampling_groups_kernel
    choice_kernel: Any = kernels._sampling_choice_kernel
    filtered_kernel: Any = _sampling_filtered_choice_kernel
    advancing: Any = {"sequence_row_stride": 2**22, "n_slots": 2**22, "pad_id": 0}
    with dry_run():
        groups_kernel[(n_rows * -(-n_groups // 4),)](
            x, flag, index, index, index, index, x, index, x, **scoring, **shared,
            BLOCK_GROUPS=4, HAS_NOISE=True, HAS_MASS=True,
        )  # fmt: skip
        choice_kernel[(n_rows,)](x, index, *state, **shared, **advancing, BLOCK=64)
        for has_top_k, has_top_p in product((False, True), (False, True)):
            filtered_kernel[(n_rows,)](
                x, index, x, x, x, index, x, index, *state, **scoring, **shared, **advancing,
                n_places=16 * n_groups, top_k=5, top_p=0.5, top_p_reach=-9.0, min_p_reach=-9.0, LANES=64, WAYS=16,
                HAS_TOP_K=has_top_k, HAS_TOP_P=has_top_p,
            )  # fmt: skip


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"min_length": -1},
        {"n_continuations": 0}, {"seed": 2**64}, {"seed": 1.5}, {"seed": torch.zeros(2).long()},
    ],
)  # fmt: skip
def test_options_without_a_distribution_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be "):
        SamplingOptions(**wrong)


@pytest.mark.parametrize("function", [sample, twin.sample])
def test_wrong_arguments_are_named(function: Any) -> None:
    logits, rows, options = make_logits(3, 19), make_rows(3, 19), SamplingOptions()
    with pytest.raises(ValueError, match=r"logits must be \(B, V\) in torch.float32.*not \(3, 19\) in torch.float64"):
        function(logits.double(), rows, options, None, PAD)
    with pytest.raises(ValueError, match=r"logits must be .* not \(19,\)"):
        function(logits[0], rows, options, None, PAD)
    with pytest.raises(ValueError, match=r"rows.slots must be torch.int64 of shape \(3,\).*not torch.int32"):
        function(logits, rows._replace(slots=rows.slots.int()), options, None, PAD)
    with pytest.raises(ValueError, match=r"rows.tokens must be .* of shape \(2,\)"):
        function(logits[:2], rows, options, None, PAD)
    with pytest.raises(ValueError, match=r"rows.sequences must be .* dense along its last axis"):
        function(logits, rows._replace(sequences=rows.sequences[:, ::2]), options, None, PAD)
    with pytest.raises(ValueError, match=r"rows.seen must be there if and only if .* absent, and the penalty 1.2"):
        function(logits, rows, SamplingOptions(repetition_penalty=1.2), None, PAD)
    with pytest.raises(ValueError, match="eos_ids must be int64"):
        function(logits, rows, options, torch.zeros(1, device=DEVICE), PAD)
    with pytest.raises(ValueError, match=r"must be on .*, not on meta"):
        function(logits, rows._replace(tokens=rows.tokens.to("meta")), options, None, PAD)
    assert [supports(logits.to(dtype)) for dtype in (*DTYPES, torch.float64)] == [True] * 3 + [False]
