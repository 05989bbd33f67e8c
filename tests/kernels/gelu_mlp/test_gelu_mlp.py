"""gelu_mlp against its formula, with each activation written out."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_parity, forward, gradients, max_error, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.common import activations, dropout
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_fast": lambda x: 0.5 * x * (1 + torch.tanh(x * math.sqrt(2 / math.pi) * (1 + 0.044715 * x * x))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def mlp_formula(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, activation: str = "gelu_new"
) -> Tensor:
    return ACTIVATIONS[activation](x @ fc_weight + fc_bias) @ proj_weight + proj_bias


def make_inputs(
    *shape: int,
    n_hidden: int,
    n_out: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x with that shape, fc_weight, fc_bias, proj_weight, proj_bias."""
    n_channels, n_out = shape[-1], n_out or shape[-1]
    tensors = [
        random(*shape),
        random(n_channels, n_hidden, seed=1) * n_channels**-0.5,
        random(n_hidden, seed=2),
        random(n_hidden, n_out, seed=3) * n_hidden**-0.5,
        random(n_out, seed=4),
    ]
    x, fc_weight, fc_bias, proj_weight, proj_bias = (relayout(tensor.to(dtype), layout) for tensor in tensors)
    return x, fc_weight, fc_bias, proj_weight, proj_bias


# --- parity ---------------------------------------------------------------------------------------------------------


def test_activations_are_those_of_transformers() -> None:
    """Which rounds the constant of gelu_fast to ten digits."""
    assert ACTIVATIONS.keys() == activations.ACTIVATIONS.keys()
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    for name, formula in ACTIVATIONS.items():
        assert max_error(ACT2FN[name](x), formula(x)) < 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "n_hidden"), [((3, 17, 32), 128), ((129, 33), 131), ((1, 64), 257)])
def test_as_accurate_as_eager(shape: tuple[int, ...], n_hidden: int, activation: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, n_hidden=n_hidden, dtype=dtype)
    functions = partial(reference.gelu_mlp, activation=activation), partial(mlp_formula, activation=activation)
    # With one row eager may round each value luckily.
    assert_parity(*functions, inputs, slack=2 if shape[0] == 1 else 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 3, 5, n_hidden=7, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(reference.gelu_mlp, activation=activation), inputs)


@given(
    shape=st.lists(st.integers(1, 7), max_size=3),
    n_channels=st.integers(1, 40),
    n_hidden=st.integers(1, 90),
    n_out=st.integers(1, 40),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_arguments(
    shape: list[int],
    n_channels: int,
    n_hidden: int,
    n_out: int,
    activation: str,
    dtype: torch.dtype,
    layout: str,
) -> None:
    inputs = make_inputs(*shape, n_channels, n_hidden=n_hidden, n_out=n_out, dtype=dtype, layout=layout)
    upstream = [relayout(random(*shape, n_out, seed=5).to(dtype), layout)]
    functions = partial(reference.gelu_mlp, activation=activation), partial(mlp_formula, activation=activation)
    assert_parity(*functions, inputs, upstream, slack=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_far_out(activation: str, dtype: torch.dtype) -> None:
    """x cubed overflows in float16 from 41 on, and exp(-x) from -12 down."""
    far = torch.tensor([-3e4, -300.0, -42.0, -13.0, 0.0, 42.0, 300.0, 3e4], dtype=dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    mlp = partial(reference.gelu_mlp, activation=activation)
    inputs = far[:, None], one, zero, one, zero
    truth = ACTIVATIONS[activation](far.double())
    assert max_error(mlp(*inputs)[:, 0] / far.abs().clamp(min=1), truth / far.abs().clamp(min=1)) < 1e-5
    dx, *_ = gradients(mlp, inputs, [torch.ones_like(far)[:, None]])
    slope = torch.where(far > 0, 1.0, 0.0) if activation == "relu" else torch.where(far > 0, 1.0, (far == 0) * 0.5)
    assert max_error(dx[:, 0], slope) < 1e-4


# --- residual and dropout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_residual_and_dropout(dropout_p: float, dtype: torch.dtype) -> None:
    inputs, residual = make_inputs(2, 9, 16, n_hidden=48, n_out=24, dtype=dtype), random(2, 9, 24, seed=6).to(dtype)
    keep, keep_scale = dropout.dropout_keep_mask((1, 1, 18, 24), dropout_p, seed=3)

    def formula(residual: Tensor, *inputs: Tensor) -> Tensor:
        product = mlp_formula(*inputs)  # pyright: ignore
        return residual + (product * keep.view(2, 9, 24) * keep_scale if dropout_p else product)

    def mlp(residual: Tensor, *inputs: Tensor) -> Tensor:
        return reference.gelu_mlp(*inputs, residual=residual, dropout_p=dropout_p, seed=3)  # pyright: ignore

    assert_parity(mlp, formula, (residual, *inputs))


def test_dropout_without_a_seed_draws_one() -> None:
    inputs = make_inputs(9, 16, n_hidden=48)
    torch.manual_seed(0)
    first, second = (reference.gelu_mlp(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, reference.gelu_mlp(*inputs, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_stream_of_another_dtype_is_promoted() -> None:
    inputs = make_inputs(9, 16, n_hidden=48, dtype=torch.bfloat16)
    out = reference.gelu_mlp(*inputs, residual=torch.zeros(9, 16))
    assert out.dtype == torch.float32
    assert torch.equal(out, reference.gelu_mlp(*inputs).float())


def test_wrong_residual_and_dropout_are_refused() -> None:
    inputs = make_inputs(3, 4, n_hidden=8, n_out=5)
    with pytest.raises(ValueError, match=r"gelu_mlp: residual must be \(3, 5\), not \(3, 4\)"):
        reference.gelu_mlp(*inputs, residual=torch.zeros(3, 4))
    for dropout_p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"gelu_mlp: dropout_p must be in \[0, 1\), not"):
            reference.gelu_mlp(*inputs, dropout_p=dropout_p)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "GELU", "", "gelu_pytorch_tanh"])
def test_unknown_activation_is_named(activation: str) -> None:
    with pytest.raises(ValueError, match=f"unknown activation '{activation}': choose one of gelu_new, gelu,"):
        reference.gelu_mlp(*make_inputs(2, 4, n_hidden=8), activation=activation)


@pytest.mark.parametrize("wrong", range(5))
def test_wrong_shapes_are_named(wrong: int) -> None:
    inputs = list(make_inputs(3, 4, n_hidden=8))
    inputs[wrong] = random(*(n + 1 for n in inputs[wrong].shape)).float()
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"gelu_mlp: .* not {shapes}"):
        forward(reference.gelu_mlp, inputs)


def test_weights_stored_out_in_are_refused() -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias = make_inputs(3, 4, n_hidden=8)
    with pytest.raises(ValueError, match=r"\(8, 4\)"):
        reference.gelu_mlp(x, fc_weight.T, fc_bias, proj_weight.T, proj_bias)


# --- bugs this field has had ----------------------------------------------------------------------------------------


def test_bug_erf_gelu_on_weights_trained_with_tanh() -> None:
    inputs = make_inputs(64, 32, n_hidden=128, dtype=torch.float64)
    default = reference.gelu_mlp(*inputs)
    assert max_error(default, mlp_formula(*inputs, activation="gelu_new")) < 1e-13
    assert max_error(default, mlp_formula(*inputs, activation="gelu")) > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bug_strided_inputs_and_upstream_gradients(layout: str) -> None:
    inputs = make_inputs(3, 5, 16, n_hidden=48, layout=layout)
    assert_parity(reference.gelu_mlp, mlp_formula, inputs, [relayout(random(3, 5, 16, seed=5).float(), layout)])


def test_bug_results_differ_between_runs() -> None:
    inputs, upstream = make_inputs(257, 32, n_hidden=128), [random(257, 32, seed=5).float()]
    first = reference.gelu_mlp(*inputs), *gradients(reference.gelu_mlp, inputs, upstream)
    for _ in range(3):
        again = reference.gelu_mlp(*inputs), *gradients(reference.gelu_mlp, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug_autocast_mixes_dtypes(dtype: torch.dtype) -> None:
    x, *weights = make_inputs(9, 16, n_hidden=64)
    inputs = [x.to(dtype), *weights]
    (truth,) = forward(mlp_formula, [tensor.double() for tensor in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        (out,) = forward(reference.gelu_mlp, inputs)
        grads = gradients(reference.gelu_mlp, inputs, [torch.ones_like(out)])
    assert out.dtype == torch.bfloat16
    assert max_error(out, truth) < 0.1
    assert [grad.dtype for grad in grads] == [dtype] + [torch.float32] * 4
