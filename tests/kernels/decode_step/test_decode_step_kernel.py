"""The decode step on the kernels against transformers' model in float64, and against what a static cache gets wrong."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, drawn_again, max_error
from fastgpt_kernels.common.activations import ACTIVATIONS
from fastgpt_kernels.common.decode_weights import Matrix
from fastgpt_kernels.common.int4 import Int4Matrix
from fastgpt_kernels.common.int8 import Int8Matrix
from fastgpt_kernels.operations.decode_step import kernels as decode_step_kernels
from fastgpt_kernels.operations.decode_step import op as decode_step_op
from fastgpt_kernels.operations.decode_step import tiles as decode_step_tiles
from fastgpt_kernels.operations.decode_step.op import DecodeStep
from fastgpt_kernels.operations.decode_step.reference import multiply
from interpreter import DEVICE, INTERPRETING, check_overflow, dry_run, shuffled_grid
from models import look_trained, pair, tiny_config, token_ids
from torch import Tensor

import fastgpt
from fastgpt.generate import KVCache, view_weights
from fastgpt.model.compat import CACHE
from fastgpt.model.rounded import RoundedLinear

only_interpreted = pytest.mark.skipif(not INTERPRETING, reason="a GPU is here: kernels run on it")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE), torch.inference_mode():
        yield


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
    places = torch.arange(n_tokens)[None] - padding[:, None]
    inputs = {"attention_mask": (places >= 0).long(), "position_ids": places.clamp(min=0)}
    past = theirs(ids[:, :-n_steps], **{name: x[:, :-n_steps] for name, x in inputs.items()})[CACHE]

    def logits() -> list[Tensor]:
        """Of the ids and of three other draws, on which eager may err more."""
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


# --- int8 weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5, 9])
def test_int8_weights_by_the_factor_rule(dtype: torch.dtype, n_rows: int) -> None:
    """Beside float64 on the rounded weights, exactly.

    Kernels multiply each sum by a scale: one rounding more than eager, whose weights are exact in float32.
    """
    # On trained-like weights, float32's errors differ by factors from draw to draw, whatever computes them.
    trained = n_rows == 5 and dtype == torch.bfloat16
    starts = [0, 3, 0, 1, 4, 0, 2, 0, 5][:n_rows]
    assert_case(make_case(dtype, starts, bits=8, rounded_head=n_rows != 5, trained=trained), n_ulps=2)


@pytest.mark.parametrize("n_rows", [1, 9])
@pytest.mark.parametrize(
    "changes", [{"n_embd": 66, "n_head": 1}, {"n_inner": 100, "activation_function": "relu", "n_layer": 1}], ids=str
)
def test_int8_weights_of_ragged_shapes(changes: dict[str, Any], n_rows: int) -> None:
    starts = [2, 0, 0, 1, 4, 0, 3, 0, 1][:n_rows]
    assert_case(make_case(torch.float32, starts, bits=8, rounded_head=True, **changes), n_ulps=2)


# --- int4 weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5, 9])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_weights_by_the_factor_rule(dtype: torch.dtype, n_rows: int, group_size: int) -> None:
    """As of int8 weights, beside float64 on the rounded weights."""
    starts = [0, 3, 0, 1, 4, 0, 2, 0, 5][:n_rows]
    case = make_case(dtype, starts, bits=4, group_size=group_size, rounded_head=n_rows != 5, n_layer=1)
    assert_case(case, n_ulps=2)


@pytest.mark.parametrize("n_rows", [1, 4, 9])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 160, "n_head": 2, "group_size": 32},
        {"n_embd": 192, "n_inner": 320},
        {"n_embd": 128, "n_inner": 64, "n_head": 1, "activation_function": "relu"},
    ],
    ids=str,
)
def test_int4_weights_of_ragged_shapes(changes: dict[str, Any], n_rows: int) -> None:
    """Widths that are no power of two, and parts of a product that end within a block."""
    starts = [2, 0, 0, 1, 4, 0, 3, 0, 1][:n_rows]
    assert_case(make_case(torch.float32, starts, bits=4, rounded_head=True, n_layer=1, **changes), n_ulps=2)


@pytest.mark.parametrize("architecture", ["cpu", "sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("n_cols", [16, 128, 800])
def test_bug_a_slice_of_int4_too_narrow_for_tensor_cores(n_cols: int, architecture: str) -> None:
    """Of 16 columns, triton up to 3.7.1 multiplied 8 twice and 8 not at all; the interpreter was right."""
    for kernel, n_rows in product(("norm_product", "project", "head"), (1, 4)):
        tile = decode_step_tiles.decode_tile(kernel, n_rows, n_cols, 1, architecture, 128)
        assert tile.block_cols >= max(128, n_cols)
        assert not tile.slices or tile.block_cols // tile.slices >= 32


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("n_cols", [128, 768, 1280, 1600, 6400])
def test_groups_are_not_divided_among_the_parts_of_a_product(n_cols: int, group_size: int) -> None:
    for n_out in (128, 768, 1600):
        n_parts, cols = decode_step_tiles.decode_parts(n_cols, n_out, group_size)
        assert cols % group_size == 0
        assert (n_parts - 1) * cols < n_cols <= n_parts * cols
        assert decode_step_tiles.decode_product_parts(1, n_cols, n_out)[1] % group_size == 0


# --- the kernels of more rows ---------------------------------------------------------------------------------------


def a_step(n_rows: int, dtype: torch.dtype) -> DecodeStep:
    model: Any = fastgpt.GPT2LMHeadModel(tiny_config())
    return DecodeStep(view_weights(model.to(DEVICE, dtype)), n_rows, 8)


KINDS = "", "int8", "int4"


def stored_as(kind: str, numbers: Tensor, dtype: torch.dtype) -> Matrix:
    if kind == "int4":
        return Int4Matrix.nearest(numbers, 32)
    return Int8Matrix.nearest(numbers) if kind == "int8" else numbers.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "int8"), (torch.float32, "int4"), *product(HALVES, KINDS)], ids=str
)
@pytest.mark.parametrize(("n_rows", "n_in", "n_out"), [(1, 64, 48), (17, 50, 67), (70, 131, 65), (16, 513, 32)])
def test_the_product_of_many_rows(n_rows: int, n_in: int, n_out: int, dtype: torch.dtype, kind: str) -> None:
    if kind == "int4":
        n_in = n_in // 32 * 32
    torch.manual_seed(0)
    x, bias = torch.randn(n_rows, n_in).to(dtype), torch.randn(n_out).to(dtype)
    numbers = torch.randn(n_in, n_out) * torch.logspace(-2, 1, n_out)
    matrix = stored_as(kind, numbers, dtype)
    floats = matrix.double() if isinstance(matrix, Tensor) else matrix.to_float(torch.float64)
    step, draws = a_step(n_rows, dtype), [drawn_again(x, seed) for seed in range(8)]
    for activation in ("none", "gelu_new"):
        act = ACTIVATIONS.get(activation, lambda y: y)
        truth, eager = act(multiply(x.double(), floats, bias.double())), act(multiply(x, matrix, bias))
        eager_error = max(
            max_error(act(multiply(draw, stored, bias)), act(multiply(draw.double(), floats, bias.double())))
            for draw in draws
            for stored in (floats.to(dtype), floats.to(dtype).contiguous())
        )
        y = torch.full((n_rows, n_out), float("nan"), dtype=dtype)
        step._product(x, matrix, bias, activation, y)
        assert_as_accurate(y, eager, truth, eager_error=eager_error)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_parts_of_a_product(dtype: torch.dtype) -> None:
    """Each is the sum over its own columns, without a bias; the last part has fewer."""
    torch.manual_seed(0)
    x, matrix = torch.randn(20, 300).to(dtype), torch.randn(300, 70).to(dtype)
    parts = torch.full((3, 20, 70), float("nan"))
    a_step(20, dtype)._product(x, matrix, None, "none", parts, cols_per_part=128)
    for part, columns, weights in zip(parts, x.split(128, 1), matrix.split(128), strict=True):
        exact = columns.double() @ weights.double()
        assert max_error(part, exact) <= 1e-6 * exact.abs().max()


def test_bug_the_last_norm_stored_over_the_row_that_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 channels lie in two threads each, of which one could read what the other had stored: seen in PTX."""
    rows: list[tuple[Tensor, Tensor | None]] = []

    def note(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        if kernel is decode_step_op._decode_norm_kernel:
            rows.append((arguments[0], arguments[5]))
        launch(kernel, n_programs, *arguments, **options)

    launch = decode_step_op.launch
    monkeypatch.setattr(decode_step_op, "launch", note)
    assert_case(make_case(torch.bfloat16, [0] * 9, n_embd=64, n_head=1))
    assert rows
    for read, stored in rows:
        assert stored is None or stored.data_ptr() != read.data_ptr()


@pytest.mark.parametrize("n_rows", [1, 9, 64, 65, 200])
@pytest.mark.parametrize("n_cols", [2, 100, 128, 768, 1600, 3072, 6400, 8192])
def test_parts_cover_the_inner_axis(n_rows: int, n_cols: int) -> None:
    """No part is empty, and more rows, which need fewer parts, change the sums of no row while one tile holds them."""
    for n_out in (2, 768, 1600, 2048):
        n_parts, cols = decode_step_tiles.decode_product_parts(n_rows, n_cols, n_out)
        assert (n_parts - 1) * cols < n_cols <= n_parts * cols
        assert n_rows > 64 or (n_parts, cols) == decode_step_tiles.decode_product_parts(1, n_cols, n_out)


def test_which_products_the_kernel_takes() -> None:
    """Half precision where launches overlap, and int8 everywhere, because torch does not multiply it."""
    takes = decode_step_tiles.decode_multiplies
    assert takes(64, 2, "sm_90")
    assert not takes(65, 2, "sm_90")
    assert not takes(9, 2, "sm_80")
    assert not takes(9, 4, "sm_90")
    assert takes(500, 1, "gfx942")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_has_the_same_logits_beside_any_others(dtype: torch.dtype) -> None:
    """The kernels of 9 to 16 rows compute each row by itself, in the same order."""
    case = make_case(dtype, [0, 3, 0, 1, 4, 0, 2, 0, 5, 0, 0, 7, 0, 1, 0, 2], n_tokens=12)
    expected = decode(case, filled_cache(case, 12))
    n_rows = 9
    for layer in case.past.layers:
        layer.keys, layer.values = layer.keys[:n_rows], layer.values[:n_rows]
    fewer = replace(case, ids=case.ids[:n_rows], starts=case.starts[:n_rows])
    found = decode(fewer, filled_cache(fewer, 12))
    # torch multiplies by the head.
    torch.testing.assert_close(found, expected[:n_rows], rtol=0, atol=1e-6)


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
    """An engine that runs ahead hands in such: nothing is read or written outside, and no other row is disturbed."""
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
