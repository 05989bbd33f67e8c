"""layer_norm and add_layer_norm, as reference and as kernel, against their formula and what others get wrong."""

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_parity, assert_same_bits, forward, gradients, max_error, relayout
from fastgpt_kernels.operations.layer_norm import tiles
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .formula import (
    add_layer_norm_formula,
    assert_layer_norm_parity,
    layer_norm_formula,
    make_inputs,
    make_sum_inputs,
    make_tensor,
    of,
)

# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [7, 127, 129, 257, 513, 768, 1024, 1025, 1280, 1600])
def test_layer_norm_is_as_accurate_as_eager(operations: Any, n_channels: int, dtype: torch.dtype) -> None:
    assert_layer_norm_parity(operations, make_inputs(7, n_channels, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "eps"), [((13,), 1e-5), ((11, 129), 0.1), ((2, 3, 768), 1e-5)])
def test_add_layer_norm_is_as_accurate_as_eager(
    operations: Any, shape: tuple[int, ...], eps: float, dtype: torch.dtype
) -> None:
    assert_layer_norm_parity(operations, make_sum_inputs(*shape, dtype=dtype), eps=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [1, 2])
def test_very_few_channels(operations: Any, n_channels: int, dtype: torch.dtype) -> None:
    inputs, upstream = make_inputs(9, n_channels, dtype=dtype), [make_tensor(9, n_channels, dtype=dtype)]
    exact = [x.double() for x in inputs]
    truth = forward(layer_norm_formula, exact) + gradients(layer_norm_formula, exact, upstream)
    actual = forward(operations.layer_norm, inputs) + gradients(operations.layer_norm, inputs, upstream)
    for ours, true in zip(actual, truth, strict=True):
        # Next to nothing remains where terms as large as 1 / sqrt(eps) cancel.
        assert max_error(ours, true) <= 30 * torch.finfo(dtype).eps * 1e-5**-0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_any_layout_of_inputs_and_gradients(operations: Any, shape: tuple[int, ...], layout: str) -> None:
    assert_layer_norm_parity(operations, make_inputs(*shape, layout=layout), layout)
    assert_layer_norm_parity(operations, make_sum_inputs(*shape, layout=layout), layout)


def test_x_and_residual_of_different_layouts(operations: Any) -> None:
    x, residual, weight, bias = make_sum_inputs(3, 5)
    assert_layer_norm_parity(operations, (x, relayout(residual, "padded"), weight, bias))
    assert_layer_norm_parity(operations, (relayout(x, "strided"), residual, weight, bias))


@cases(80)
@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    n_channels=st.integers(8, 270),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    has_residual=st.booleans(),
)
def test_random_arguments(
    operations: Any, shape: list[int], n_channels: int, dtype: torch.dtype, layout: str, scale: float, eps: float,
    has_residual: bool,
) -> None:  # fmt: skip
    x, residual, weight, bias = make_sum_inputs(*shape, n_channels, dtype=dtype)
    inputs = (relayout(x * scale, layout), *([relayout(residual, layout)] if has_residual else []), weight, bias)
    assert_layer_norm_parity(operations, inputs, layout, eps=eps, slack=4)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_gradients_are_those_of_finite_differences(operations: Any, eps: float, has_residual: bool) -> None:
    inputs = make_sum_inputs(2, 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (inputs if has_residual else inputs[1:])]
    assert torch.autograd.gradcheck(partial(of(operations, inputs), eps=eps), inputs)


def test_constant_rows_give_the_bias(operations: Any) -> None:
    _, weight, bias = make_inputs(3, 16)
    x = torch.tensor([[0.0], [1.0], [-3e4]]).expand(3, 16)
    assert torch.equal(operations.layer_norm(x, weight, bias), bias.expand(3, 16))
    dx, _, _ = gradients(operations.layer_norm, (x, weight, bias), [make_tensor(3, 16)])
    assert dx.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_a_number_stays_in_its_row(operations: Any) -> None:
    x, weight, bias = make_inputs(4, 33)
    expected = operations.layer_norm(x, weight, bias)
    x[1, 7], x[2, 0] = float("nan"), float("inf")
    y = operations.layer_norm(x, weight, bias)
    assert y[1:3].isnan().all()
    assert torch.equal(y[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_result_in_another_dtype_is_the_rounded_one(operations: Any, dtype: torch.dtype, has_residual: bool) -> None:
    """And the gradients have the bits of those that pass through a cast."""
    inputs = [tensor.requires_grad_() for tensor in (make_sum_inputs(5, 40) if has_residual else make_inputs(5, 40))]
    upstream = make_tensor(5, 40, dtype=dtype), make_tensor(5, 40, seed=5)

    def results(**options: Any) -> list[Tensor]:
        normalised, *summed = forward(partial(of(operations, inputs), **options), inputs)
        outputs = [normalised.to(dtype), *summed]
        assert options == {} or normalised.dtype == dtype
        return [*outputs, *torch.autograd.grad(outputs, inputs, upstream[: len(outputs)])]

    for ours, cast in zip(results(dtype=dtype), results(), strict=True):
        assert torch.equal(ours, cast)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_is_not_used(operations: Any, used: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_sum_inputs(3, 8)]
    ours, theirs = (
        torch.autograd.grad(forward(operation, inputs)[used].sum(), inputs, allow_unused=True)
        for operation in (operations.add_layer_norm, add_layer_norm_formula)
    )
    for grad, expected in zip(ours, theirs, strict=True):
        assert (grad is None) == (expected is None)
        torch.testing.assert_close(grad, expected)


def test_wrong_shapes_are_refused(operations: Any) -> None:
    x, weight, bias = make_inputs(3, 8)
    for args in ((x, weight[:7], bias), (x, weight, bias[:7]), (x, weight[None], bias), (x.T, weight, bias)):
        with pytest.raises(ValueError, match=r"weight \(.*\) and bias \(.*\) must be \(\d,\)"):
            operations.layer_norm(*args)
    with pytest.raises(ValueError, match=r"x \(3, 8\) and residual \(2, 8\) differ"):
        operations.add_layer_norm(x, x[:2], weight, bias)
    with pytest.raises(ValueError, match="must be"):
        operations.add_layer_norm(x, x, weight[:7], bias)


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e2, 1e4, -1e5])
def test_bug_layer_norm_cancels_at_large_mean(operations: Any, mean: float) -> None:
    _, weight, bias = make_inputs(8, 768)
    x = make_tensor(8, 768) + mean

    def from_square_of_the_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        average = x.mean(-1, keepdim=True)
        variance = (x * x).mean(-1, keepdim=True) - average * average
        return (x - average) / (variance.relu() + 1e-5).sqrt() * weight + bias

    assert_parity(operations.layer_norm, layer_norm_formula, [x, weight, bias], slack=16)
    with pytest.raises(AssertionError, match="error"):
        assert_parity(from_square_of_the_mean, layer_norm_formula, [x, weight, bias], slack=16)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("eps", [0, 0.0, 1e-60])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 5])
def test_bug_rows_past_the_end_without_eps(operations: Any, n_rows: int, eps: float) -> None:
    """1e-60 is zero in float32."""
    assert_layer_norm_parity(operations, make_inputs(n_rows, 24), eps=eps, slack=4)
    assert_layer_norm_parity(operations, make_sum_inputs(n_rows, 24), eps=eps, slack=4)


@pytest.mark.parametrize("n_rows", [1, 2, 63, 64, 65, 257])
def test_bug_weight_gradient_misses_rows(operations: Any, n_rows: int) -> None:
    """Partial sums of dweight and dbias sized unlike the grid; in integers, where every row shows."""
    x, upstream = make_tensor(n_rows, 4), make_tensor(n_rows, 4, seed=5).mul(2).round()
    _, _, dbias = gradients(operations.layer_norm, (x, torch.ones(4), torch.zeros(4)), [upstream])
    assert torch.equal(dbias, upstream.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_bug_weight_gradient_summed_in_half_precision(
    operations: Any, dtype: torch.dtype, weight_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3000 ones sum to 256 in bfloat16 and to 2048 in float16."""
    monkeypatch.setattr(tiles, "layer_norm_tile", lambda *_: tiles.LayerNormTile(8, 64, 4))
    x, weight, bias = make_inputs(3000, 8, dtype=dtype)
    inputs = [x, weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype)]
    upstream = torch.ones(3000, 8, dtype=dtype)
    truth = gradients(layer_norm_formula, [t.double() for t in inputs], [upstream])
    for ours, true in zip(gradients(operations.layer_norm, inputs, [upstream])[1:], truth[1:], strict=True):
        assert max_error(ours, true) <= 2 * torch.finfo(dtype).eps * true.abs().max()


def test_bug_results_differ_between_runs(operations: Any) -> None:
    inputs, upstream = make_inputs(129, 96), [make_tensor(129, 96)]
    first = [operations.layer_norm(*inputs), *gradients(operations.layer_norm, inputs, upstream)]
    for _ in range(3):
        again = [operations.layer_norm(*inputs), *gradients(operations.layer_norm, inputs, upstream)]
        assert_same_bits(first, again)


def test_bug_more_rows_than_a_grid_axis_holds(operations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few programs, because the interpreter takes milliseconds for each."""
    monkeypatch.setattr(tiles, "layer_norm_tile", lambda *_: tiles.LayerNormTile(4, 1024, 4))
    x, weight, bias = make_inputs(65536 + 3, 4)
    truth = layer_norm_formula(x.double(), weight.double(), bias.double())
    assert max_error(operations.layer_norm(x, weight, bias), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug_autocast_mixes_dtypes(operations: Any, dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(5, 32)
    x, upstream = x.to(dtype), [make_tensor(5, 32, dtype=dtype)]
    with torch.autocast(x.device.type, torch.bfloat16):
        dx, dweight, dbias = gradients(operations.layer_norm, (x, weight, bias), upstream)
    truth = gradients(layer_norm_formula, [t.double() for t in (x, weight, bias)], upstream)
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype, torch.float32, torch.float32)
    for grad, exact in zip((dx, dweight, dbias), truth, strict=True):
        assert max_error(grad, exact) <= 2 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
