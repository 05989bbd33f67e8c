"""gelu_mlp, as reference and as kernel, against its formula and what others get wrong."""

from typing import Any

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_same_bits, forward, gradients, max_error, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.common import activations
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from .formula import (
    ACTIVATIONS,
    ONE_SUM,
    assert_mlp_parity,
    formula,
    make_inputs,
    mlp_formula,
    of,
    results,
)

# --- parity ---------------------------------------------------------------------------------------------------------


def test_activations_are_those_of_transformers() -> None:
    """Which rounds the constant of gelu_fast to ten digits."""
    assert ACTIVATIONS.keys() == activations.ACTIVATIONS.keys()
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    for name, activation in ACTIVATIONS.items():
        assert max_error(ACT2FN[name](x), activation(x)) < 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "n_hidden"), [((3, 17, 32), 128), ((65, 33), 257)])
def test_as_accurate_as_eager(
    operations: Any, shape: tuple[int, ...], n_hidden: int, activation: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(*shape, n_hidden=n_hidden, dtype=dtype)
    one_sum = operations is not reference and dtype == torch.float32
    assert_mlp_parity(operations, inputs, activation=activation, slack=ONE_SUM if one_sum else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(("shape", "n_out"), [((2, 21, 48), 80), ((67, 40), 33), ((1, 8), 8)])
@pytest.mark.usefixtures("small_tiles")
def test_residual_and_dropout(
    operations: Any, shape: tuple[int, ...], n_out: int, dropout_p: float, dtype: torch.dtype
) -> None:
    inputs = make_inputs(*shape, n_hidden=96, n_out=n_out, dtype=dtype, has_residual=True)
    # With one row eager may round each value luckily.
    assert_mlp_parity(operations, inputs, dropout_p=dropout_p, slack=2 if shape[0] == 1 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_inputs_and_gradients(operations: Any, layout: str) -> None:
    inputs = make_inputs(2, 19, 24, n_hidden=72, n_out=40, layout=layout, has_residual=True)
    assert_mlp_parity(operations, inputs, relayout(random(2, 19, 40, seed=5).to(inputs[0]), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_tiles")
def test_any_layout_in_small_tiles(operations: Any, layout: str) -> None:
    test_any_layout_of_inputs_and_gradients(operations, layout)


@cases(50)
@given(
    shape=st.lists(st.integers(1, 7), max_size=3),
    n_channels=st.integers(1, 40),
    n_hidden=st.integers(1, 90),
    n_out=st.integers(1, 40),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    has_residual=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_random_arguments(
    operations: Any, shape: list[int], n_channels: int, n_hidden: int, n_out: int, activation: str,
    dtype: torch.dtype, layout: str, has_residual: bool, dropout_p: float,
) -> None:  # fmt: skip
    sizes: dict[str, Any] = {"n_hidden": n_hidden, "n_out": n_out, "dtype": dtype}
    inputs = make_inputs(*shape, n_channels, **sizes, layout=layout, has_residual=has_residual)
    upstream = relayout(random(*shape, n_out, seed=5).to(dtype), layout)
    assert_mlp_parity(operations, inputs, upstream, activation=activation, dropout_p=dropout_p, slack=4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(operations: Any, activation: str) -> None:
    inputs = make_inputs(2, 2, n_hidden=3, dtype=torch.float64, has_residual=True)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    function = of(operations, activation=activation, dropout_p=0.3)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=operations is not reference)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_far_out(operations: Any, activation: str, dtype: torch.dtype) -> None:
    """x cubed overflows in float16 from 41 on, exp(-x) from -12 down, and exp(-2u) in float32 from x = -11 down."""
    far = torch.tensor([-6e4, -1e4, -300, -100, -42, -30, -11, -10, 0, 10, 11, 30, 42, 100, 300, 1e4, 6e4], dtype=dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    exact = far.double().requires_grad_()
    truth = activations.ACTIVATIONS[activation](exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    function, inputs = of(operations, activation=activation), (far[:, None], one, zero, one, zero)
    (dx, *_) = gradients(function, inputs, [torch.ones_like(far)[:, None]])
    n_ulps = 64 if dtype == torch.float64 else 4  # In float64 the truth errs too.
    for ours, true in ((forward(function, inputs)[0], truth), (dx, slope)):
        assert (abs(ours[:, 0].double() - true) <= n_ulps * torch.finfo(dtype).eps * true.abs().clamp(min=1)).all()


# --- residual and dropout -------------------------------------------------------------------------------------------


def test_dropout_without_a_seed_draws_one(operations: Any) -> None:
    inputs = make_inputs(9, 16, n_hidden=48)
    torch.manual_seed(0)
    first, second = (operations.gelu_mlp(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, operations.gelu_mlp(*inputs, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_wrong_residual_and_dropout_are_refused(operations: Any) -> None:
    inputs = make_inputs(3, 4, n_hidden=8, n_out=5)
    with pytest.raises(ValueError, match=r"gelu_mlp: residual must be \(3, 5\), not \(3, 4\)"):
        operations.gelu_mlp(*inputs, residual=torch.zeros(3, 4))
    for dropout_p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"gelu_mlp: dropout_p must be in \[0, 1\), not"):
            operations.gelu_mlp(*inputs, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_stream_of_another_dtype_is_promoted(operations: Any, dropout_p: float) -> None:
    *inputs, residual = make_inputs(20, 16, n_hidden=32, dtype=torch.bfloat16, has_residual=True)
    out, *grads = results(of(operations, dropout_p=dropout_p), (*inputs, residual.float()))
    exact = [tensor.double() for tensor in (*inputs, residual)]
    assert out.dtype == grads[-1].dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads[:-1])
    assert max_error(out, formula(*exact, dropout_p=dropout_p)) < 0.05


def test_bug_a_wide_stream_is_rounded(operations: Any) -> None:
    *inputs, residual = make_inputs(20, 16, n_hidden=32, has_residual=True)
    out = operations.gelu_mlp(*(tensor * 0 for tensor in inputs), residual=residual.double() / 3)
    assert torch.equal(out, residual.double() / 3)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "GELU", "", "gelu_pytorch_tanh"])
def test_unknown_activation_is_named(operations: Any, activation: str) -> None:
    with pytest.raises(ValueError, match=f"unknown activation '{activation}': choose one of gelu_new, gelu,"):
        operations.gelu_mlp(*make_inputs(2, 4, n_hidden=8), activation=activation)


@pytest.mark.parametrize("wrong", range(5))
def test_wrong_shapes_are_named(operations: Any, wrong: int) -> None:
    inputs = list(make_inputs(3, 4, n_hidden=8))
    inputs[wrong] = random(*(n + 1 for n in inputs[wrong].shape)).float()
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"gelu_mlp: .* not {shapes}"):
        forward(operations.gelu_mlp, inputs)


@pytest.mark.parametrize("wrong", range(6))
def test_wrong_shapes_with_a_residual_are_named(operations: Any, wrong: int) -> None:
    inputs = list(make_inputs(3, 4, n_hidden=8, has_residual=True))
    inputs[wrong] = torch.zeros([n + 1 for n in inputs[wrong].shape])
    with pytest.raises(ValueError, match=r"gelu_mlp: .* not .*\(\d, \d\)"):
        operations.gelu_mlp(*inputs[:5], residual=inputs[5])


def test_weights_stored_out_in_are_refused(operations: Any) -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias = make_inputs(3, 4, n_hidden=8)
    with pytest.raises(ValueError, match=r"\(8, 4\)"):
        operations.gelu_mlp(x, fc_weight.T, fc_bias, proj_weight.T, proj_bias)


# --- bugs this field has had ----------------------------------------------------------------------------------------


def test_bug_erf_gelu_on_weights_trained_with_tanh(operations: Any) -> None:
    inputs = make_inputs(64, 32, n_hidden=128, dtype=torch.float64)
    default = operations.gelu_mlp(*inputs)
    assert max_error(default, mlp_formula(*inputs, activation="gelu_new")) < 1e-13  # pyright: ignore
    assert max_error(default, mlp_formula(*inputs, activation="gelu")) > 1e-4  # pyright: ignore


def test_bug_results_differ_between_runs(operations: Any) -> None:
    inputs, function = make_inputs(65, 32, n_hidden=128), of(operations)
    first = results(function, inputs)
    for _ in range(3):
        assert_same_bits(results(function, inputs), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug_autocast_mixes_dtypes(operations: Any, dtype: torch.dtype) -> None:
    x, *weights = make_inputs(9, 16, n_hidden=64)
    inputs = [x.to(dtype), *weights]
    (truth,) = forward(mlp_formula, [tensor.double() for tensor in inputs])
    with torch.autocast(x.device.type, torch.bfloat16):
        (out,) = forward(operations.gelu_mlp, inputs)
        grads = gradients(operations.gelu_mlp, inputs, [torch.ones_like(out)])
    assert out.dtype == torch.bfloat16
    assert max_error(out, truth) < 0.1
    assert [grad.dtype for grad in grads] == [dtype] + [torch.float32] * 4
