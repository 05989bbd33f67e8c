"""The Triton linear_cross_entropy against its formula and the reference, and against what kernels get wrong."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import fastgpt_kernels
import pytest
import torch
import triton
import triton.language as tl
from accuracy import DTYPES, LAYOUTS, assert_parity, forward, gradients, max_error, random, relayout
from fastgpt_kernels.operations.linear_cross_entropy import kernels
from fastgpt_kernels.operations.linear_cross_entropy import op as module
from fastgpt_kernels.operations.linear_cross_entropy import tiles as linear_cross_entropy_tiles
from fastgpt_kernels.operations.linear_cross_entropy.op import linear_cross_entropy, supports
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE, INTERPRETING, check_overflow
from torch import Tensor

from .test_linear_cross_entropy import REDUCTIONS, LargestTensor, loss_formula
from .test_linear_cross_entropy import make_inputs as make_inputs_on_cpu

only_interpreted = pytest.mark.skipif(not INTERPRETING, reason="a GPU is here: kernels run on it")
HALVES = [torch.bfloat16, torch.float16]
CHUNK_ROWS = 4


def make_inputs(*sizes: int, layout: str = "contiguous", **options: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(hidden, weight) of (N, C, V) and the labels."""
    (hidden, weight), labels = make_inputs_on_cpu(*sizes, **options)  # pyright: ignore
    return (relayout(hidden.to(DEVICE), layout), relayout(weight.to(DEVICE), layout)), labels.to(DEVICE)


def make_upstream(n_rows: int, layout: str = "contiguous") -> Tensor:
    return relayout(random(n_rows, seed=5).to(DEVICE, torch.float32), layout)


def assert_loss_parity(
    inputs: tuple[Tensor, ...], labels: Tensor, upstream: Tensor | None = None, *, slack: float = 1.0, **options: Any
) -> None:
    fused, formula = (partial(f, labels=labels, **options) for f in (linear_cross_entropy, loss_formula))
    if upstream is None:
        shape = labels.shape if options.get("reduction") == "none" else ()
        upstream = random(*shape, seed=99).to(DEVICE, inputs[0].dtype)
    assert_parity(fused, formula, inputs, [upstream], slack=slack)


def results(inputs: tuple[Tensor, ...], labels: Tensor, **options: Any) -> list[Tensor]:
    """The loss and the gradients of hidden and weight."""
    loss = partial(linear_cross_entropy, labels=labels, **options)
    (value,) = forward(loss, inputs)
    return [value, *gradients(loss, inputs, [random(*value.shape, seed=5).to(DEVICE)])]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(autouse=True)
def _several_chunks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy_tiles, "linear_cross_entropy_chunk_rows", lambda *_: CHUNK_ROWS)
    if INTERPRETING:
        monkeypatch.setattr(linear_cross_entropy_tiles, "LINEAR_CROSS_ENTROPY_LANES", 8)


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(6, 16, 101), (5, 31, 257), (7, 64, 2), (1, 16, 128), (5, 5, 64)])
def test_as_accurate_as_eager(sizes: tuple[int, int, int], reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(*sizes, dtype=dtype)
    assert_loss_parity(inputs, labels, reduction=reduction)


@pytest.mark.parametrize(("n_vocabulary", "dtype"), [(50257, torch.bfloat16), (50304, torch.float32)])
def test_gpt2s_vocabulary(n_vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tile and the chunk that ship
    inputs, labels = make_inputs(5, 8, n_vocabulary, dtype=dtype)
    for reduction in REDUCTIONS:
        assert_loss_parity(inputs, labels, reduction=reduction)


@pytest.mark.parametrize("n_chunk_rows", [1, 6, 12, 13, 14])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunks_end_anywhere(n_chunk_rows: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy_tiles, "linear_cross_entropy_chunk_rows", lambda *_: n_chunk_rows)
    inputs, labels = make_inputs(13, 8, 19, dtype=torch.bfloat16)
    assert_loss_parity(inputs, labels, reduction=reduction)


@cases(70)
@given(
    sizes=st.tuples(st.integers(1, 16), st.integers(1, 40), st.integers(1, 200)),
    n_chunk_rows=st.integers(1, 20),
    reduction=st.sampled_from(REDUCTIONS),
    ignored=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_arguments(
    sizes: tuple[int, int, int], n_chunk_rows: int, reduction: str, ignored: float, dtype: torch.dtype, layout: str
) -> None:
    inputs, labels = make_inputs(*sizes, dtype=dtype, layout=layout, ignored=ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy_tiles, "linear_cross_entropy_chunk_rows", lambda *_: n_chunk_rows)
        assert_loss_parity(inputs, labels, reduction=reduction, slack=4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_those_of_finite_differences(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy_tiles, "LINEAR_CROSS_ENTROPY_LANES", 32)
    inputs, labels = make_inputs(5, 2, 5, dtype=torch.float64)
    loss = partial(linear_cross_entropy, labels=labels, reduction=reduction)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_huge_logits_stay_finite(scale: float, dtype: torch.dtype) -> None:
    (hidden, weight), labels = make_inputs(9, 16, 50, dtype=dtype)
    for reduction in REDUCTIONS:
        assert_loss_parity((hidden * scale, weight), labels, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vocabulary_of_one(reduction: str) -> None:
    for result in results(*make_inputs(6, 4, 1), reduction=reduction):
        assert torch.equal(result, torch.zeros_like(result))


@only_interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_row(poison: float) -> None:
    (hidden, weight), labels = make_inputs(5, 8, 19, ignored=0.0)
    loss = partial(linear_cross_entropy, labels=labels, reduction="none")
    expected = loss(hidden, weight)
    hidden[2, 3] = poison
    losses = loss(hidden, weight)
    assert losses[2].isnan()
    assert torch.equal(losses[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input_alone(wanted: int, reduction: str) -> None:
    inputs, labels = make_inputs(6, 8, 19)
    loss = partial(linear_cross_entropy, labels=labels, reduction=reduction)
    both = gradients(loss, inputs, [torch.ones_like(loss(*inputs))])
    inputs[wanted].requires_grad_()
    loss(*inputs).sum().backward()
    assert inputs[1 - wanted].grad is None
    torch.testing.assert_close(inputs[wanted].grad, both[wanted])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_gradient_is_computed_where_none_is_wanted(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[bool] = []
    launch = module.launch

    def record(*args: Any, **arguments: Any) -> None:
        computed.append(arguments["HAS_GRADIENT"])
        launch(*args, **arguments)

    monkeypatch.setattr(module, "launch", record)
    inputs, labels = make_inputs(3, 8, 19)
    expected = linear_cross_entropy(*inputs, labels, reduction=reduction)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*leaves, labels, reduction=reduction), expected)  # pyright: ignore
    assert torch.equal(linear_cross_entropy(*leaves, labels, reduction=reduction), expected)  # pyright: ignore
    assert computed == [False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_is_in_float32_at_least(reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(5, 8, 19, dtype=dtype)
    loss = linear_cross_entropy(*inputs, labels, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((5,) if reduction == "none" else ())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_never_exist_at_once(reduction: str) -> None:
    inputs, labels = make_inputs(32, 4, 101)
    leaves = [x.requires_grad_() for x in inputs]
    with LargestTensor() as largest:
        linear_cross_entropy(*leaves, labels, reduction=reduction).sum().backward()  # pyright: ignore
    assert largest.n_elements <= CHUNK_ROWS * 128 * 4  # the bytes of a chunk, which the interpreter copies


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("n_cols", [1, 50304, 2**21, 2**31])
def test_chunks_are_whole_tiles_in_bounded_memory(
    n_cols: int, element_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for n_rows in (0, 1, 127, 128, 129, 2**14, 2**20):
        rows = linear_cross_entropy_tiles.linear_cross_entropy_chunk_rows(n_rows, n_cols * element_size)
        assert rows % 128 == 0
        assert rows * n_cols * element_size <= 2**28 or rows <= 128
        assert rows < n_rows + 128
    for n_rows in (2**14, 2**14 + 1):  # the last of 7 chunks is little shorter than the others
        assert linear_cross_entropy_tiles.linear_cross_entropy_chunk_rows(n_rows, 2 * 50304) == 2432


# --- layouts and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_layout_of_inputs_and_gradients(reduction: str, layout: str) -> None:
    inputs, labels = make_inputs(6, 8, 19, layout=layout)
    upstream = make_upstream(6, layout) if reduction == "none" else None
    assert_loss_parity(inputs, labels, upstream, reduction=reduction)
    wide = torch.full((6, 2), 2**40, device=DEVICE)
    wide[:, 0] = labels
    assert_same_bits(results(inputs, wide[:, 0], reduction=reduction), results(inputs, labels, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_autocast_mixes_dtypes(reduction: str) -> None:
    (hidden, weight), labels = make_inputs(13, 16, 19)
    formula = partial(loss_formula, labels=labels, reduction=reduction)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = hidden.to(dtype), weight
        exact = [x.double() for x in inputs]
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, *grads = results(inputs, labels, reduction=reduction)
        (truth,) = forward(formula, exact)
        assert loss.dtype == torch.float32
        assert max_error(loss, truth) <= 0.02 * truth.abs().max()
        true_grads = gradients(formula, exact, [random(*truth.shape, seed=5).to(DEVICE)])
        for grad, true, x in zip(grads, true_grads, inputs, strict=True):
            assert grad.dtype == x.dtype
            assert max_error(grad, true) <= 0.05 * true.abs().max()


def test_autocast_leaves_float64_alone() -> None:
    inputs, labels = make_inputs(3, 8, 19, dtype=torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_loss_parity(inputs, labels)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    (hidden, weight), labels = make_inputs(3, 8, 19)
    with pytest.raises(ValueError, match=r"must be \(N, C\).*not \(3, 8\), \(19, 7\), \(3,\)"):
        linear_cross_entropy(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match="unknown reduction 'batchmean'"):
        linear_cross_entropy(hidden, weight, labels, reduction="batchmean")
    with pytest.raises(ValueError, match=r"must share one dtype, not torch.bfloat16, torch.float32"):
        linear_cross_entropy(hidden.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match=r"no kernel for torch\.int64: it takes torch\.float32"):
        linear_cross_entropy(hidden.long(), weight.long(), labels)
    with pytest.raises(ValueError, match=r"must be on .*, not on meta"):
        linear_cross_entropy(hidden, weight.to("meta"), labels)
    assert [supports(hidden.to(dtype)) for dtype in (*DTYPES, torch.int64)] == [True] * 4 + [False]


def test_package_finds_the_kernel() -> None:
    assert fastgpt_kernels.kernel("linear_cross_entropy") is linear_cross_entropy


@only_interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_arithmetic_overflows_in_use(reduction: str) -> None:
    with check_overflow():
        results(*make_inputs(9, 8, 70, ignored=0.0), ignore_index=2**62, reduction=reduction)


# --- bugs this field has had ----------------------------------------------------------------------------------------


def loss_without_looking_at_labels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """As on a GPU, where a look at the labels would wait for it."""
    monkeypatch.setattr(module, "check_loss_arguments", lambda *_: None)
    return linear_cross_entropy


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label", [19, 2**62, -1])
def test_bug_label_out_of_range_crashes_later(label: int, reduction: str) -> None:
    (hidden, weight), labels = make_inputs(5, 8, 19)
    labels[2] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside the vocabulary: it must be in \[0, 19\)"):
        linear_cross_entropy(hidden.cpu(), weight.cpu(), labels.cpu(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label", [19, 63, 64, 2**31, 2**32 + 3, 2**62, -1, -99, -(2**62)])
def test_bug_label_out_of_range_gives_a_plausible_loss(
    label: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, labels = make_inputs(5, 8, 19, ignored=0.0)
    loss = partial(loss_without_looking_at_labels(monkeypatch), reduction=reduction)
    expected = gradients(partial(loss, labels=labels), inputs, [torch.ones_like(loss(*inputs, labels))])
    labels[2] = label
    value = loss(*inputs, labels)
    wrong = torch.arange(5, device=DEVICE) == 2
    assert torch.equal(value.isnan(), wrong) if reduction == "none" else value.isnan()
    dhidden, dweight = gradients(partial(loss, labels=labels), inputs, [torch.ones_like(value)])
    assert dhidden[2].isnan().all()
    assert dweight.isnan().all()
    assert torch.equal(dhidden[~wrong], expected[0][~wrong])


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 1000, 2**62])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bug_sentinel_label_hits_a_column(reduction: str, ignore_index: int) -> None:
    """Whether the ignored label is a word, lies in the padding or far away."""
    inputs, labels = make_inputs(9, 8, 19)
    labels[labels == -100], labels[3] = ignore_index, 5
    assert_loss_parity(inputs, labels, reduction=reduction, ignore_index=ignore_index)
    dhidden, _ = gradients(
        partial(linear_cross_entropy, labels=labels, ignore_index=ignore_index), inputs, [torch.ones((), device=DEVICE)]
    )
    assert torch.equal((dhidden == 0).all(1), labels == ignore_index)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_ignored_rows_are_read(reduction: str) -> None:
    """NaN in a row that does not count reaches nothing but the weight, through 0 * NaN, as in the reference."""
    (hidden, weight), labels = make_inputs(9, 8, 19)
    ignored = labels == -100
    loss, dhidden, _ = results((hidden, weight), labels, reduction=reduction)
    assert torch.equal((dhidden == 0).all(1), ignored)
    hidden[ignored] = float("nan")
    *same, dweight = results((hidden, weight), labels, reduction=reduction)
    assert_same_bits(same, [loss, dhidden])
    assert dweight.isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_every_label_ignored(reduction: str) -> None:
    """As torch has it: a mean of nothing is NaN, and its gradient is zero."""
    inputs, labels = make_inputs(9, 8, 19)
    loss, dhidden, dweight = results(inputs, torch.full_like(labels, -100), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else torch.equal(loss, torch.zeros_like(loss))
    for grad in (dhidden, dweight):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_no_rows(reduction: str) -> None:
    inputs, labels = make_inputs(0, 8, 19)
    loss, dhidden, dweight = results(inputs, labels, reduction=reduction)
    torch.testing.assert_close(loss, loss_formula(*inputs, labels, reduction=reduction), equal_nan=True)
    assert dhidden.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros_like(inputs[1]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_padded_columns_add_exp_0(reduction: str) -> None:
    """It shows most where every true logit is far below zero."""
    (hidden, weight), labels = make_inputs(9, 8, 67)
    hidden[:, 0], weight[:, 0] = 10.0, -10.0
    assert_loss_parity((hidden, weight), labels, reduction=reduction)


@triton.jit
def _load_logits_with_zeros_in_the_padding(row_ptr, cols, n_cols, n_padded_cols, ACCUMULATOR: tl.constexpr):
    logits = tl.load(row_ptr + cols, mask=cols < n_padded_cols, other=0.0).to(ACCUMULATOR)
    return tl.where(cols < n_cols, logits, 0.0)


@only_interpreted
def test_a_wrong_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = make_inputs(5, 8, 67, dtype=torch.bfloat16)
    assert_loss_parity(inputs, labels)
    monkeypatch.setattr(kernels, "_load_logits", _load_logits_with_zeros_in_the_padding)
    with pytest.raises(AssertionError, match="error"):
        assert_loss_parity(inputs, labels)


def test_bug_gradient_scaled_by_the_first_tokens() -> None:
    inputs, labels = make_inputs(13, 8, 19, ignored=0.0)
    for upstream in (make_upstream(13), torch.ones((), device=DEVICE).expand(13), torch.zeros(13, device=DEVICE)):
        assert_loss_parity(inputs, labels, upstream, reduction="none")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_a_number_upstream_stays_in_its_row() -> None:
    inputs, labels = make_inputs(5, 8, 19, ignored=0.0)
    loss = partial(linear_cross_entropy, labels=labels, reduction="none")
    for poison in (float("nan"), float("inf")):
        upstream = torch.tensor([1.0, 0.5, poison, 2.0, 0.0], device=DEVICE)
        dhidden, _ = gradients(loss, inputs, [upstream])
        expected, _ = gradients(loss, inputs, [upstream.nan_to_num(0.0, 0.0)])
        assert not dhidden[2].isfinite().any()
        torch.testing.assert_close(dhidden[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [0.0, -1 / 3, 2.0**17, 2.0**-20])
def test_bug_upstream_gradient_of_a_scaled_loss(scale: float, reduction: str, dtype: torch.dtype) -> None:
    """A loss scale of 65536 and more is infinite in float16; 1/3 in bfloat16 would shift every gradient alike."""
    inputs, labels = make_inputs(3, 64, 19, dtype=dtype, ignored=0.0)
    inputs = tuple(x / 100 for x in inputs)  # so that scaled gradients are finite
    loss = partial(linear_cross_entropy, labels=labels, reduction=reduction)
    (value,) = forward(loss, inputs)
    grads = gradients(loss, inputs, [torch.full_like(value, scale)])
    exact = [x.double() for x in inputs]
    true_grads = gradients(
        partial(loss_formula, labels=labels, reduction=reduction), exact, [torch.full_like(value, scale)]
    )
    for grad, true in zip(grads, true_grads, strict=True):
        # bfloat16 rounds the logits and their gradient; the least float16 is 6e-8.
        assert max_error(grad, true) <= 4 * torch.finfo(dtype).eps * true.abs().max() + 6e-8


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bug_weight_gradient_summed_in_half_precision(reduction: str, dtype: torch.dtype) -> None:
    """Over 30 chunks; the hidden states are positive, so that the sum grows."""
    (hidden, weight), labels = make_inputs(120, 8, 3, dtype=dtype)
    assert_loss_parity((hidden.abs(), weight), labels.clamp(max=0), reduction=reduction)


def test_weight_gradient_is_summed_in_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the product itself: nothing in half precision is copied to float32."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: calls.append(options))
    total, half = SimpleNamespace(dtype=torch.float32), SimpleNamespace(dtype=torch.float16, is_cuda=True)
    module._add_product(total, half, half, beta=0)  # pyright: ignore
    assert calls == [{"out_dtype": torch.float32, "beta": 0, "out": total}]
