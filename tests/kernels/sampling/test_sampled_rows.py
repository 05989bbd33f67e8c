"""What the Triton sample and its reference make of the rows, of logits that are not finite, and of wrong arguments."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from fastgpt_kernels.operations.sampling import kernels
from fastgpt_kernels.operations.sampling import reference as twin
from fastgpt_kernels.operations.sampling.filter_kernels import _sampling_filtered_choice_kernel
from fastgpt_kernels.operations.sampling.op import sample, supports
from fastgpt_kernels.operations.sampling.reference import SamplingOptions
from interpreter import DEVICE, check_overflow, dry_run, only_interpreted, shuffled_grid
from torch import Tensor

from .formula import DTYPES, FILTERS, OVERFLOWS_ARE_RIGHT, PAD, after, assert_same_rows, draws, make_logits, make_rows

pytestmark = OVERFLOWS_ARE_RIGHT

# --- what becomes of the rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [sample, twin.sample])
@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"seed": 1, "top_k": 3}])
@pytest.mark.parametrize("slot", [39, -3])
def test_rows_move_on(slot: int, options: dict[str, Any], function: Any) -> None:
    logits = make_logits(4, 37, scale=0.0)
    for row, token in enumerate((3, 9, 20, 36)):
        logits[row, token] = 1e5
    before = make_rows(4, 37, penalty=2.0)
    before.finished[1] = True
    before.slots[2], before.slots[3] = 38, slot  # the last of 40 slots, and one outside
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


@pytest.mark.parametrize("function", [sample, twin.sample])
def test_bug_negated_logits_are_read_without_their_sign(function: Any) -> None:
    logits, options = make_logits(4, 37), SamplingOptions()
    negated = torch._neg_view(-logits)
    expected = after(function, logits, make_rows(4, 37), options)
    assert torch.equal(after(function, negated, make_rows(4, 37), options).tokens, expected.tokens)


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


@pytest.mark.parametrize("filters", FILTERS)
def test_scratch_memory_is_read_only_where_it_was_written(
    filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds NaN in the other tests, which is above no threshold, so that a read of it would not show."""
    logits = make_logits(2, 131)
    expected = draws(logits, seed=4, **filters)
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *size, **options: new_empty(*size, **options).fill_(2**30))
    assert torch.equal(draws(logits, seed=4, **filters), expected)


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
