"""What the Triton linear_cross_entropy has beyond its reference: tiles, NaN, launches, memory, refusals."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastgpt_kernels
import pytest
import torch
import triton
import triton.language as tl
from accuracy import DTYPES, forward, gradients, max_error
from fastgpt_kernels.operations.linear_cross_entropy import kernels, tiles
from fastgpt_kernels.operations.linear_cross_entropy import op as module
from fastgpt_kernels.operations.linear_cross_entropy.op import linear_cross_entropy, supports
from interpreter import check_overflow, only_interpreted

from .formula import (
    REDUCTIONS,
    assert_loss_parity,
    loss_formula,
    make_inputs,
    results,
)

pytestmark = pytest.mark.usefixtures("on_the_device")


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(6, 16, 101), (5, 31, 257)])
def test_rows_of_several_tiles(sizes: tuple[int, int, int], reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(*sizes, dtype=dtype)
    assert_loss_parity(fastgpt_kernels, inputs, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vocabulary_padded_to_whole_tiles(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's, with the tile and the chunk that ship."""
    monkeypatch.undo()
    inputs, labels = make_inputs(5, 8, 50304)
    assert_loss_parity(fastgpt_kernels, inputs, labels, reduction=reduction)


# --- what is not a number -------------------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_a_number_upstream_stays_in_its_row() -> None:
    inputs, labels = make_inputs(5, 8, 19, ignored=0.0)
    loss = partial(linear_cross_entropy, labels=labels, reduction="none")
    for poison in (float("nan"), float("inf")):
        upstream = torch.tensor([1.0, 0.5, poison, 2.0, 0.0])
        dhidden, _ = gradients(loss, inputs, [upstream])
        expected, _ = gradients(loss, inputs, [upstream.nan_to_num(0.0, 0.0)])
        assert not dhidden[2].isfinite().any()
        torch.testing.assert_close(dhidden[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


# --- rounding -------------------------------------------------------------------------------------------------------


@triton.jit
def _load_logits_with_zeros_in_the_padding(
    row_ptr, cols, n_cols, n_padded_cols, IS_TAIL: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    logits = tl.load(row_ptr + cols, mask=cols < n_padded_cols, other=0.0).to(ACCUMULATOR)
    return tl.where(cols < n_cols, logits, 0.0)


@only_interpreted
def test_a_wrong_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = make_inputs(5, 8, 67, dtype=torch.bfloat16)
    assert_loss_parity(fastgpt_kernels, inputs, labels)
    monkeypatch.setattr(kernels, "_load_logits", _load_logits_with_zeros_in_the_padding)
    with pytest.raises(AssertionError, match="error"):
        assert_loss_parity(fastgpt_kernels, inputs, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -1 / 3, 2.0**17, 2.0**-20])
def test_bug_upstream_of_row_losses_under_loss_scaling(scale: float, dtype: torch.dtype) -> None:
    """A loss scale of 65536 and more is infinite in float16; 1/3 in bfloat16 would shift every gradient alike."""
    inputs, labels = make_inputs(3, 64, 19, dtype=dtype, ignored=0.0)
    inputs = tuple(x / 100 for x in inputs)  # so that scaled gradients are finite
    loss = partial(linear_cross_entropy, labels=labels, reduction="none")
    (value,) = forward(loss, inputs)
    upstream = [torch.full_like(value, scale)]
    exact = [x.double() for x in inputs]
    true_grads = gradients(partial(loss_formula, labels=labels, reduction="none"), exact, upstream)
    for grad, true in zip(gradients(loss, inputs, upstream), true_grads, strict=True):
        # bfloat16 rounds the logits and their gradient; the least float16 is 6e-8.
        assert max_error(grad, true) <= 4 * torch.finfo(dtype).eps * true.abs().max() + 6e-8


def test_weight_gradient_is_summed_in_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the product itself: nothing in half precision is copied to float32."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: calls.append(options))
    total, half = SimpleNamespace(dtype=torch.float32), SimpleNamespace(dtype=torch.float16, is_cuda=True)
    module._add_product(total, half, half, beta=0)  # pyright: ignore
    assert calls == [{"out_dtype": torch.float32, "beta": 0, "out": total}]


# --- launches and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_gradient_is_computed_where_none_is_wanted(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[bool] = []
    launch = module._launch_losses

    def record(*arguments: Any) -> None:
        *_, has_gradient = arguments
        computed.append(has_gradient)
        launch(*arguments)

    monkeypatch.setattr(module, "_launch_losses", record)
    inputs, labels = make_inputs(3, 8, 19)
    expected = linear_cross_entropy(*inputs, labels, reduction=reduction)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*leaves, labels, reduction=reduction), expected)  # pyright: ignore
    assert torch.equal(linear_cross_entropy(*leaves, labels, reduction=reduction), expected)  # pyright: ignore
    assert computed == [False, False, True]


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("n_cols", [1, 50304, 2**21, 2**31])
def test_chunks_are_whole_tiles_in_bounded_memory(
    n_cols: int, element_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for n_rows in (0, 1, 127, 128, 129, 2**14, 2**20):
        rows = tiles.linear_cross_entropy_chunk_rows(n_rows, n_cols * element_size, 0)
        assert rows % 128 == 0
        assert rows * n_cols * element_size <= 2**28 or rows <= 128
        assert rows < n_rows + 128
    for n_rows in (2**14, 2**14 + 1):  # the last of 7 chunks is little shorter than the others
        assert tiles.linear_cross_entropy_chunk_rows(n_rows, 2 * 50304, 0) == 2432


@pytest.mark.parametrize("n_channels", [768, 1024, 1280, 1600])
def test_memory_is_at_most_15_percent_of_an_unfused_head(n_channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 x 1024 tokens in bfloat16, as in the lesson; chunks remain long enough to hide the traffic of dW."""
    monkeypatch.undo()
    n_rows, n_cols, n_padded_cols = 2**14, 50257, 50304
    dweight, dhidden = 4 * n_cols * n_channels, 2 * n_rows * n_channels
    rows = tiles.linear_cross_entropy_chunk_rows(n_rows, 2 * n_padded_cols, dhidden + dweight)
    parts = [2 * n_padded_cols * rows, dweight, dhidden]
    unfused = 4 * n_rows * n_cols + 2 * n_cols * n_channels + dhidden
    assert sum(parts) <= 0.15 * unfused
    # 2 * rows * V * C operations at 7.9e14 FLOP/s, 8 * V * C bytes at 4.3e12 B/s.
    assert 2 * rows / 7.9e14 > 8 / 4.3e12
    readme = (Path(module.__file__).parent / "README.md").read_text()
    tables = [line.strip("| ").split(" | ") for line in readme.split("| MB | ")[1].splitlines()]
    column = [row[[768, 1024, 1280, 1600].index(n_channels) + 1] for row in tables[2:8]]
    megabytes = [f"{size / 1e6:.0f}" for size in (*parts, sum(parts), unfused)]
    assert column == [*megabytes, f"{sum(parts) / unfused:.1%}".replace("%", " %")]


@only_interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_arithmetic_overflows_in_use(reduction: str) -> None:
    inputs, labels = make_inputs(9, 8, 70, ignored=0.0)
    with check_overflow():
        results(fastgpt_kernels, inputs, labels, ignore_index=2**62, reduction=reduction)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_the_kernel_cannot_do_is_refused() -> None:
    (hidden, weight), labels = make_inputs(3, 8, 19)
    with pytest.raises(ValueError, match=r"must share one dtype, not torch.bfloat16, torch.float32"):
        linear_cross_entropy(hidden.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match=r"no kernel for torch\.int64: it takes torch\.float32"):
        linear_cross_entropy(hidden.long(), weight.long(), labels)
    with pytest.raises(ValueError, match=r"must be on .*, not on meta"):
        linear_cross_entropy(hidden, weight.to("meta"), labels)
    assert [supports(hidden.to(dtype)) for dtype in (*DTYPES, torch.int64)] == [True] * 4 + [False]


def test_package_finds_the_kernel() -> None:
    assert fastgpt_kernels.kernel("linear_cross_entropy") is linear_cross_entropy
