"""layer_norm and add_layer_norm against their formula, and the helper that judges them."""

from functools import partial

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_as_accurate, assert_parity, forward, gradients, max_error, random, relayout
from fastgpt_kernels import reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def layer_norm_formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered * centered).mean(-1, keepdim=True)
    return centered / (variance + eps).sqrt() * weight + bias


def add_layer_norm_formula(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return layer_norm_formula(summed, weight, bias, eps), summed


def make_inputs(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """x with that shape, weight and bias."""
    x = relayout((2 * random(*shape) + 0.5).to(dtype), layout)
    return x, (1 + random(shape[-1], seed=1)).to(dtype), random(shape[-1], seed=2).to(dtype)


# --- the helper -----------------------------------------------------------------------------------------------------


def test_helper_accepts_eager_and_refuses_wrong_results() -> None:
    x, weight, bias = make_inputs(33, 64, dtype=torch.bfloat16)
    eager = layer_norm_formula(x, weight, bias)
    truth = layer_norm_formula(x.double(), weight.double(), bias.double())
    assert_as_accurate(eager, eager, truth)
    assert_as_accurate(truth.bfloat16(), eager, truth)

    one_wrong, one_nan = eager.clone(), eager.clone()
    one_wrong[17, 5] += 1.0
    one_nan[17, 5] = float("nan")
    for wrong in (one_wrong, one_nan, eager.flip(0), torch.zeros_like(eager), eager * 1.05):
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(wrong, eager, truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(eager[:1], eager, truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate(eager.float(), eager, truth)
    with pytest.raises(AssertionError, match="nothing can be said"):
        assert_as_accurate(eager, one_nan, truth)


@pytest.mark.parametrize("lost", ["weight", "bias", "eps", "gradient"])
def test_helper_refuses_a_layer_norm_with_one_mistake(lost: str) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = torch.ones_like(weight) + 0 * weight if lost == "weight" else weight
        bias = 0 * bias if lost == "bias" else bias
        x = (x + x.detach()) / 2 if lost == "gradient" else x
        return reference.layer_norm(x, weight, bias, eps=1e-3 if lost == "eps" else 1e-5)

    with pytest.raises(AssertionError, match="error"):
        assert_parity(wrong, layer_norm_formula, make_inputs(33, 64))


# --- layer_norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [7, 127, 129, 768, 1025, 1600])
def test_layer_norm_is_as_accurate_as_eager(n_channels: int, dtype: torch.dtype) -> None:
    assert_parity(reference.layer_norm, layer_norm_formula, make_inputs(37, n_channels, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", [1, 2])
def test_layer_norm_of_very_few_channels(n_channels: int, dtype: torch.dtype) -> None:
    inputs, upstream = make_inputs(37, n_channels, dtype=dtype), [random(37, n_channels, seed=3).to(dtype)]
    exact = [x.double() for x in inputs]
    truth = forward(layer_norm_formula, exact) + gradients(layer_norm_formula, exact, upstream)
    actual = forward(reference.layer_norm, inputs) + gradients(reference.layer_norm, inputs, upstream)
    for ours, true in zip(actual, truth, strict=True):
        # Next to nothing remains where terms as large as 1 / sqrt(eps) cancel.
        assert max_error(ours, true) <= 30 * torch.finfo(dtype).eps * 1e-5**-0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_layer_norm_reads_any_layout(shape: tuple[int, ...], layout: str) -> None:
    upstream = relayout(random(*shape, seed=3).float(), layout)
    assert_parity(reference.layer_norm, layer_norm_formula, make_inputs(*shape, layout=layout), [upstream])


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_layer_norm_gradients_are_those_of_finite_differences(eps: float) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 3, 5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(reference.layer_norm, eps=eps), inputs)


@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    n_channels=st.integers(8, 130),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_layer_norm_on_random_arguments(
    shape: list[int], n_channels: int, dtype: torch.dtype, layout: str, scale: float, eps: float
) -> None:
    x, weight, bias = make_inputs(*shape, n_channels, dtype=dtype)
    inputs = relayout(x * scale, layout), weight, bias
    assert_parity(partial(reference.layer_norm, eps=eps), partial(layer_norm_formula, eps=eps), inputs, slack=4)


def test_layer_norm_of_constant_rows_is_the_bias() -> None:
    _, weight, bias = make_inputs(3, 16)
    x = torch.tensor([[0.0], [1.0], [-3e4]]).expand(3, 16)
    assert torch.equal(reference.layer_norm(x, weight, bias), bias.expand(3, 16))
    dx, _, _ = gradients(reference.layer_norm, (x, weight, bias), [random(3, 16).float()])
    assert dx.isfinite().all()


def test_layer_norm_refuses_wrong_shapes() -> None:
    x, weight, bias = make_inputs(3, 8)
    for args in ((x, weight[:7], bias), (x, weight, bias[:7]), (x, weight[None], bias), (x.T, weight, bias)):
        with pytest.raises(ValueError, match=r"weight \(.*\) and bias \(.*\) must be \(\d,\)"):
            reference.layer_norm(*args)


# --- add_layer_norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "eps"), [((13,), 1e-5), ((37, 129), 0.1), ((2, 5, 768), 1e-5)])
def test_add_layer_norm_is_as_accurate_as_eager(
    shape: tuple[int, ...], eps: float, layout: str, dtype: torch.dtype
) -> None:
    x, weight, bias = make_inputs(*shape, dtype=dtype, layout=layout)
    inputs = x, relayout(random(*shape, seed=4).to(dtype), layout), weight, bias
    assert_parity(partial(reference.add_layer_norm, eps=eps), partial(add_layer_norm_formula, eps=eps), inputs)


def test_add_layer_norm_gradients_are_those_of_finite_differences() -> None:
    x, weight, bias = make_inputs(2, 5, dtype=torch.float64)
    inputs = x, random(2, 5, seed=4), weight, bias
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(reference.add_layer_norm, inputs)


@pytest.mark.parametrize("used", [0, 1])
def test_add_layer_norm_when_one_output_is_not_used(used: int) -> None:
    x, weight, bias = make_inputs(3, 8)
    inputs = x, random(3, 8, seed=4).float(), weight, bias
    for tensor in inputs:
        tensor.requires_grad_()
    ours = torch.autograd.grad(reference.add_layer_norm(*inputs)[used].sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad(add_layer_norm_formula(*inputs)[used].sum(), inputs, allow_unused=True)
    for grad, expected in zip(ours, theirs, strict=True):
        assert (grad is None) == (expected is None)
        torch.testing.assert_close(grad, expected)


def test_add_layer_norm_refuses_wrong_shapes() -> None:
    x, weight, bias = make_inputs(3, 8)
    with pytest.raises(ValueError, match=r"x \(3, 8\) and residual \(2, 8\) differ"):
        reference.add_layer_norm(x, x[:2], weight, bias)
    with pytest.raises(ValueError, match="must be"):
        reference.add_layer_norm(x, x, weight[:7], bias)


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e2, 1e4, -1e5])
def test_bug_layer_norm_cancels_at_large_mean(mean: float) -> None:
    _, weight, bias = make_inputs(16, 768)
    x = random(16, 768).float() + mean

    def from_square_of_the_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        average = x.mean(-1, keepdim=True)
        variance = (x * x).mean(-1, keepdim=True) - average * average
        return (x - average) / (variance.relu() + 1e-5).sqrt() * weight + bias

    assert_parity(reference.layer_norm, layer_norm_formula, [x, weight, bias], slack=16)
    with pytest.raises(AssertionError, match="error"):
        assert_parity(from_square_of_the_mean, layer_norm_formula, [x, weight, bias], slack=16)


@pytest.mark.parametrize("n_rows", [1, 2, 63, 64, 65, 257, 4099])
def test_bug_weight_gradient_misses_rows(n_rows: int) -> None:
    """Partial sums of dweight and dbias sized unlike the grid; in integers, where every row shows."""
    x = random(n_rows, 4).float()
    upstream = torch.randint(-4, 5, (n_rows, 4), generator=torch.Generator().manual_seed(0)).float()
    _, _, dbias = gradients(reference.layer_norm, (x, torch.ones(4), torch.zeros(4)), [upstream])
    assert torch.equal(dbias, upstream.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_bug_weight_gradient_summed_in_half_precision(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    """2048 ones sum to 256 in bfloat16 and to 2048 in float32."""
    x, weight, bias = make_inputs(3000, 8, dtype=dtype)
    inputs = [x, weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype)]
    upstream = torch.ones(3000, 8, dtype=dtype)
    truth = gradients(layer_norm_formula, [t.double() for t in inputs], [upstream])
    for ours, true in zip(gradients(reference.layer_norm, inputs, [upstream])[1:], truth[1:], strict=True):
        assert max_error(ours, true) <= 2 * torch.finfo(dtype).eps * true.abs().max()


def test_bug_results_differ_between_runs() -> None:
    inputs, upstream = make_inputs(513, 96), [random(513, 96, seed=3).float()]
    first = [reference.layer_norm(*inputs), *gradients(reference.layer_norm, inputs, upstream)]
    for _ in range(3):
        again = [reference.layer_norm(*inputs), *gradients(reference.layer_norm, inputs, upstream)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bug_upstream_gradient_without_strides() -> None:
    """The gradient of a sum is one element, expanded."""
    inputs = make_inputs(6, 33)
    expanded, dense = torch.ones(()).expand(6, 33), torch.ones(6, 33)
    for ours, expected in zip(*(gradients(reference.layer_norm, inputs, [g]) for g in (expanded, dense)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 5, 8)])
def test_bug_no_rows(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape)
    for operation, args in (
        (reference.layer_norm, inputs),
        (reference.add_layer_norm, (inputs[0], *inputs)),
    ):
        outputs = forward(operation, args)
        assert all(output.shape == shape for output in outputs)
        *_, dweight, dbias = gradients(operation, args, outputs)
        assert torch.equal(dweight, torch.zeros(8))
        assert torch.equal(dbias, torch.zeros(8))


def test_bug_more_rows_than_a_grid_axis_holds() -> None:
    x, weight, bias = make_inputs(65536 + 3, 4)
    truth = layer_norm_formula(x.double(), weight.double(), bias.double())
    assert max_error(reference.layer_norm(x, weight, bias), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug_autocast_mixes_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(5, 32)
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        dx, dweight, dbias = gradients(reference.layer_norm, (x, weight, bias), [random(5, 32, seed=3).to(dtype)])
    truth = gradients(layer_norm_formula, [t.double() for t in (x, weight, bias)], [random(5, 32, seed=3).to(dtype)])
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype, torch.float32, torch.float32)
    for grad, exact in zip((dx, dweight, dbias), truth, strict=True):
        assert max_error(grad, exact) <= 2 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
