"""The decode step on the kernels against transformers' model in float64, and against what a static cache gets wrong."""

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from fastgpt_kernels.operations.decode_step import kernels as decode_step_kernels
from fastgpt_kernels.operations.decode_step import tiles as decode_step_tiles
from fastgpt_kernels.operations.decode_step.op import DecodeStep
from interpreter import INTERPRETING, check_overflow, dry_run, only_interpreted, shuffled_grid
from models import tiny_config
from torch import Tensor

import fastgpt
from fastgpt.generate import view_weights

from .cases import HALVES, assert_case, decode, filled_cache, make_case

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("starts", [[0], [3, 0], [0, 5, 37], list(range(9))], ids=len)
def test_logits_by_the_factor_rule(dtype: torch.dtype, starts: list[int]) -> None:
    """One row, few and more rows than the fused kernels take, with padding that holds NaN."""
    assert_case(make_case(dtype, starts))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_are_float32_in_every_batch(dtype: torch.dtype) -> None:
    """Rounded to the weights' dtype in some batches and not in others, they would draw other tokens from one seed."""
    for n_rows in (1, 7, 9):
        case = make_case(dtype, [0] * n_rows)
        logits = decode(case, filled_cache(case, 48))
        assert (logits.to(dtype).float() != logits).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_on_trained_like_weights(dtype: torch.dtype) -> None:
    assert_case(make_case(dtype, [0, 2], trained=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 66, "n_head": 1},
        {"n_embd": 160, "n_head": 2},
        {"n_embd": 192, "n_head": 2, "n_inner": 100, "activation_function": "relu"},
        {"activation_function": "gelu", "tie_word_embeddings": False},
        {"activation_function": "silu", "layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu_fast", "scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        {"vocab_size": 1001, "n_layer": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_rows", [1, 5])
def test_configurations(changes: dict[str, Any], n_rows: int) -> None:
    assert_case(make_case(torch.float32, [2, 0, 0, 1, 4][:n_rows], **changes))


@pytest.mark.parametrize(
    "changes",
    [{"n_embd": 2, "n_head": 2}, {"n_embd": 32, "n_head": 4}, {"n_embd": 64, "n_head": 1}, {"n_inner": 20}],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "int8"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)])
def test_bug_a_slice_too_narrow_for_tensor_cores(dtype: torch.dtype, int8: bool, changes: dict[str, Any]) -> None:
    """Eight slices of fewer than 128 columns have fewer than the 16 that a product on tensor cores takes."""
    n_ulps = 2 if int8 else 1
    assert_case(
        make_case(dtype, [1, 0], n_tokens=6, n_steps=1, bits=8 if int8 else None, rounded_head=int8, **changes),
        n_ulps=n_ulps,
    )


# --- contexts and sequences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [2, 32, 33, 34, 65, 95])
def test_contexts_around_a_block_of_keys(n_tokens: int) -> None:
    assert_case(make_case(torch.float32, [0, 1], n_tokens, n_steps=1), n_slots=96)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("n_new", [1, 3, 6])
@pytest.mark.parametrize("start", [0, 33])
def test_several_new_tokens_of_one_sequence(dtype: torch.dtype, n_new: int, start: int) -> None:
    """In few and in many rows; the last of them, in the slot past the cache, goes nowhere and still has its logits."""
    case = make_case(dtype, [start], 41, n_new)
    cache, weights = filled_cache(case, 40), view_weights(case.ours)
    step = DecodeStep(weights, n_new, 40, one_sequence=True)
    for scratch in vars(step).values():
        if isinstance(scratch, Tensor):
            scratch.fill_(float("nan"))
    logits = torch.full((n_new, case.ours.config.vocab_size), float("nan"))
    slots = torch.arange(case.n_prompt, 41)
    before = cache.memory.clone()
    step.decode(weights, cache.memory, case.ids[0, -n_new:], slots - start, slots, case.starts.repeat(n_new), logits)
    assert_as_accurate(logits.to(dtype), case.eager[0], case.truth[0])
    assert torch.equal(
        cache.memory[..., : case.n_prompt, :].nan_to_num(7.0), before[..., : case.n_prompt, :].nan_to_num(7.0)
    )
    assert cache.memory[..., case.n_prompt :, :].isfinite().all()
    if dtype == torch.float32:
        expected = filled_cache(case, 48)
        decode(case, expected)
        torch.testing.assert_close(cache.memory[..., start:, :], expected.memory[..., start:40, :])


@pytest.mark.parametrize("width", [(768, 12), (1280, 20), (1600, 25)], ids=str)
def test_widths_of_gpt2(width: tuple[int, int]) -> None:
    case = make_case(torch.bfloat16, [0], 9, 1, n_embd=width[0], n_head=width[1], n_layer=1)
    assert_case(case, n_slots=9)


@pytest.mark.parametrize("slot", [12, 2**40, -1, -5, 2**20 - 2**32])
def test_ids_and_slots_outside_their_tables(slot: int) -> None:
    """An engine that runs ahead passes such values: nothing outside is read or written, no other row is disturbed."""
    case = make_case(torch.float32, [0, 0], 12, 1)
    expected = decode(case, filled_cache(case, 12))
    weights, cache = view_weights(case.ours), filled_cache(case, 12)
    before = cache.memory.clone()
    step, logits = DecodeStep(weights, 2, 12), torch.empty(2, 131)
    tokens = torch.stack([torch.tensor(-1), case.ids[1, 11]])
    slots, positions = torch.tensor([slot, 11]), torch.tensor([96, 11])
    step.decode(weights, cache.memory, tokens, positions, slots, case.starts, logits)
    assert torch.equal(logits[1], expected[1, 0])
    assert torch.equal(cache.memory[:, :, 0].nan_to_num(7.0), before[:, :, 0].nan_to_num(7.0))


def test_a_row_starts_at_slot_0_at_the_earliest() -> None:
    case = make_case(torch.float32, [0, 0], 12, 1)
    expected = decode(case, filled_cache(case, 12))
    weights, cache, logits = view_weights(case.ours), filled_cache(case, 12), torch.empty(2, 131)
    slots, starts = torch.tensor([11, 11]), torch.tensor([0, -3])  # the last slots of the row before, which hold keys
    DecodeStep(weights, 2, 12).decode(weights, cache.memory, case.ids[:, 11].clone(), slots, slots, starts, logits)
    assert torch.equal(logits, expected[:, 0])


@pytest.mark.parametrize("n_rows", [1, 3, 9])
def test_repeats_are_bitwise_equal_in_any_order_of_programs(n_rows: int) -> None:
    case = make_case(torch.bfloat16, [0] * n_rows)
    expected = decode(case, filled_cache(case, 48))
    for seed in range(2):
        if INTERPRETING:
            with shuffled_grid(seed):
                assert torch.equal(decode(case, filled_cache(case, 48)), expected)
        else:
            assert torch.equal(decode(case, filled_cache(case, 48)), expected)


@pytest.mark.parametrize(("n_row_heads", "expected"), [(1, 32), (2, 32), (4, 32), (12, 10), (25, 5), (200, 1)])
def test_bug_the_splits_of_few_heads_take_minutes_to_compile(n_row_heads: int, expected: int) -> None:
    assert decode_step_tiles.decode_splits(n_row_heads, 8192, "sm_90") == expected


def test_splits_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.float32, [0])
    for n_splits in (1, 2, 7):
        monkeypatch.setattr(decode_step_tiles, "decode_splits", lambda *_, n_splits=n_splits: n_splits)
        assert_as_accurate(decode(case, filled_cache(case, 48)), case.eager, case.truth)


@only_interpreted
def test_index_arithmetic_of_a_huge_cache() -> None:
    """2^33 elements of keys, of which nothing is held."""
    kernel: Any = decode_step_kernels._decode_attention_kernel
    n_rows, n_heads, n_slots, head_dim = 2048, 64, 1024, 64
    small = torch.empty(8)
    with dry_run():
        kernel[(n_rows * n_heads * 2,)](
            small, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), *[small] * 5,
            n_heads=n_heads, n_slots=n_slots, head_dim=head_dim, scale=1.0,
            BLOCK_DIM=64, BLOCK_KEYS=32, BLOCK_NEW=0, N_SPLITS=2, STAGES=2, OVERLAP=False,
        )  # fmt: skip


@only_interpreted
@pytest.mark.parametrize(("dtype", "n_rows"), [(torch.float32, 2), (torch.bfloat16, 9)], ids=str)
def test_no_index_overflows(dtype: torch.dtype, n_rows: int) -> None:
    case = make_case(dtype, [0, 3] * (n_rows // 2) + [1] * (n_rows % 2), 12, 1)
    with check_overflow():
        decode(case, filled_cache(case, 12))


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({}, torch.float64, "no decode kernel for torch.float64"),
        ({"n_embd": 258, "n_head": 2}, torch.float32, "heads of 129 are larger than 128"),
        ({"n_embd": 4160, "n_head": 65, "n_layer": 1}, torch.float32, "4160 channels are too wide"),
        ({}, torch.bfloat16, None),
    ],
)
def test_obstacles(changes: dict[str, Any], dtype: torch.dtype, reason: str | None) -> None:
    with torch.device("meta"):
        model: Any = fastgpt.GPT2LMHeadModel(tiny_config(**changes))
        model.to(dtype)
    found = DecodeStep.obstacle(view_weights(model))
    assert found is None if reason is None else reason in str(found)
