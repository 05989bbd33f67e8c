"""The Triton gelu_mlp against its formula and the reference, and against what kernels get wrong."""

from collections.abc import Iterator
from functools import partial, wraps
from typing import Any

import pytest
import torch
import triton.language as tl
from accuracy import DTYPES, LAYOUTS, assert_parity, forward, gradients, max_error, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.common import activation_kernels, activations, dropout
from fastgpt_kernels.operations.gelu_mlp import tiles as gelu_mlp_tiles
from fastgpt_kernels.operations.gelu_mlp.op import gelu_mlp, supports
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE, INTERPRETING
from torch import Tensor

from .test_gelu_mlp import ACTIVATIONS, mlp_formula
from .test_gelu_mlp import make_inputs as make_inputs_on_cpu

only_interpreted = pytest.mark.skipif(not INTERPRETING, reason="a GPU is here: kernels run on it")
SEED = 7


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a small tensor; with tensor descriptors and few programs where they can hold the matrices."""
    monkeypatch.setattr(
        gelu_mlp_tiles,
        "product_tile",
        lambda size, _, describable: gelu_mlp_tiles.ProductTile(16, 64, 32, 4, 2, int(describable)),
    )


def make_inputs(
    *shape: int, has_residual: bool = False, layout: str = "contiguous", **options: Any
) -> tuple[Tensor, ...]:
    """x, fc_weight, fc_bias, proj_weight, proj_bias, and a residual when asked for."""
    inputs = list(make_inputs_on_cpu(*shape, **options))
    if has_residual:
        inputs.append(random(*shape[:-1], inputs[4].shape[0], seed=6).to(inputs[0].dtype))
    return tuple(relayout(tensor.to(DEVICE), layout) for tensor in inputs)


@wraps(gelu_mlp)
def fused(*inputs: Tensor, **options: Any) -> Tensor:
    return gelu_mlp(*inputs[:5], residual=inputs[5] if len(inputs) == 6 else None, seed=SEED, **options)  # pyright: ignore


# A GPU adds up an element of a float32 product one term after the other; torch's CPU library takes several sums, which
# err less where the inner axis is long.
ONE_SUM = 2


def formula(*inputs: Tensor, activation: str = "gelu_new", dropout_p: float = 0.0) -> Tensor:
    out = mlp_formula(*inputs[:5], activation=activation)  # pyright: ignore
    if dropout_p > 0.0:
        rows = out.reshape(-1, out.shape[-1])
        keep, keep_scale = dropout.dropout_keep_mask((1, 1, rows.shape[0], rows.shape[1]), dropout_p, SEED, out.device)
        out = (rows * keep[0, 0] * keep_scale).view(out.shape)
    return inputs[5] + out if len(inputs) == 6 else out


def assert_mlp_parity(inputs: tuple[Tensor, ...], upstream: Tensor | None = None, **options: Any) -> None:
    slack = options.pop("slack", 1.0)
    grads = None if upstream is None else [upstream]
    assert_parity(partial(fused, **options), partial(formula, **options), inputs, grads, slack=slack)


def results(inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Output and gradients."""
    function = partial(fused, **options)
    upstream = random(*inputs[0].shape[:-1], inputs[4].shape[0], seed=5).to(inputs[0])
    return [*forward(function, inputs), *gradients(function, inputs, [upstream])]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "n_hidden"), [((3, 17, 32), 128), ((65, 33), 257)])
def test_as_accurate_as_eager(shape: tuple[int, ...], n_hidden: int, activation: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, n_hidden=n_hidden, dtype=dtype)
    assert_mlp_parity(inputs, activation=activation, slack=ONE_SUM if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(("shape", "n_out"), [((2, 21, 48), 80), ((67, 40), 33), ((1, 8), 8)])
@pytest.mark.usefixtures("small_tiles")
def test_residual_and_dropout(shape: tuple[int, ...], n_out: int, dropout_p: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, n_hidden=96, n_out=n_out, dtype=dtype, has_residual=True)
    assert_mlp_parity(inputs, dropout_p=dropout_p, slack=2 if shape[0] == 1 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("small", [False, True])
def test_any_layout_of_inputs_and_gradients(layout: str, small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("small_tiles")
    inputs = make_inputs(2, 19, 24, n_hidden=72, n_out=40, layout=layout, has_residual=True)
    assert_mlp_parity(inputs, relayout(random(2, 19, 40, seed=5).to(inputs[0]), layout))


@cases(70)
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
    shape: list[int], n_channels: int, n_hidden: int, n_out: int, activation: str, dtype: torch.dtype, layout: str,
    has_residual: bool, dropout_p: float,
) -> None:  # fmt: skip
    sizes: dict[str, Any] = {"n_hidden": n_hidden, "n_out": n_out, "dtype": dtype}
    inputs = make_inputs(*shape, n_channels, **sizes, layout=layout, has_residual=has_residual)
    assert_mlp_parity(inputs, activation=activation, dropout_p=dropout_p, slack=4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: str) -> None:
    inputs = make_inputs(2, 2, n_hidden=3, dtype=torch.float64, has_residual=True)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(partial(fused, activation=activation, dropout_p=0.3), inputs, fast_mode=True)


@only_interpreted
def test_a_wrong_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(33, 16, n_hidden=64)
    assert_mlp_parity(inputs)
    monkeypatch.setattr(activation_kernels, "_CUBIC", tl.constexpr(0.0448))
    with pytest.raises(AssertionError, match="error"):
        assert_mlp_parity(inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out(activation: str, dtype: torch.dtype) -> None:
    """x cubed overflows in float16 from 41 on, exp(-x) from -12 down, and exp(-2u) in float32 from x = -11 down."""
    far = torch.tensor([-6e4, -1e4, -100, -30, -11, -10, 0, 10, 11, 30, 100, 1e4, 6e4], dtype=dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    exact = far.double().requires_grad_()
    truth = activations.ACTIVATIONS[activation](exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    inputs = far[:, None], one, zero, one, zero
    (dx, *_) = gradients(partial(fused, activation=activation), inputs, [torch.ones(13, 1)])
    n_ulps = 64 if dtype == torch.float64 else 4  # In float64 the truth errs too.
    for ours, true in ((fused(*inputs, activation=activation), truth), (dx, slope)):
        assert (abs(ours[:, 0].double() - true) <= n_ulps * torch.finfo(dtype).eps * true.abs().clamp(min=1)).all()


def test_output_is_rounded_once() -> None:
    """A residual far above the product, which leaves no room for a rounding between them."""
    x, fc_weight, fc_bias, proj_weight, proj_bias = make_inputs(9, 16, n_hidden=32, dtype=torch.bfloat16)
    inputs = x, fc_weight, fc_bias, proj_weight * 0, torch.full_like(proj_bias, 1.0)
    # Its step is 2: the kept 1.0204 rounds up to it, but in bfloat16 would be 1.0234 and 1 a tie, that goes to 256.
    residual = torch.full((9, 16), 256.0, dtype=torch.bfloat16)
    dropped = fused(*inputs, residual, dropout_p=0.02)
    assert set(dropped.unique().tolist()) == {256.0, 258.0}


def test_bits_do_not_depend_on_gradients_being_wanted() -> None:
    inputs = make_inputs(40, 32, n_hidden=64, dtype=torch.bfloat16)
    without = fused(*inputs)
    assert torch.equal(without, fused(*[tensor.requires_grad_() for tensor in inputs]))


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_dropout_is_the_references_to_the_bit(dtype: torch.dtype) -> None:
    """Where the product is 1 everywhere, and in the gradient of its bias and input."""
    n_rows, n_out = 37, 72
    x, fc_weight, fc_bias, proj_weight, proj_bias = make_inputs(n_rows, 8, n_hidden=16, n_out=n_out, dtype=dtype)
    inputs = x, fc_weight, fc_bias, proj_weight * 0, torch.ones_like(proj_bias)
    keep, keep_scale = dropout.dropout_keep_mask((1, 1, n_rows, n_out), 0.3, SEED, x.device)
    assert torch.equal(fused(*inputs, dropout_p=0.3), (keep[0, 0] * keep_scale).to(dtype))
    *_, dbias = gradients(partial(fused, dropout_p=0.3), inputs, [torch.ones(n_rows, n_out)])
    assert max_error(dbias, keep[0, 0].sum(0) * keep_scale) <= torch.finfo(dtype).eps * n_rows


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_output_of_several_column_tiles(dropout_p: float) -> None:
    """Wider than the tile of the pass that sums the bias gradient."""
    n_out = 2 * gelu_mlp_tiles.GELU_MLP_BWD_PRODUCT.block_cols + 3
    assert_mlp_parity(make_inputs(5, 8, n_hidden=16, n_out=n_out), dropout_p=dropout_p, slack=ONE_SUM)


def test_seeds() -> None:
    inputs = make_inputs(9, 16, n_hidden=32)
    seed = torch.tensor(SEED)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = gelu_mlp(*leaves, dropout_p=0.5, seed=seed)  # pyright: ignore
    seed.add_(1)
    grads = torch.autograd.grad(out.sum(), leaves)
    again = fused(*leaves, dropout_p=0.5)
    assert torch.equal(out, again)
    assert_same_bits(list(grads), list(torch.autograd.grad(again.sum(), leaves)))
    torch.manual_seed(0)
    drawn = [gelu_mlp(*inputs, dropout_p=0.5) for _ in range(2)]  # pyright: ignore
    assert not torch.equal(*drawn)


# --- dtypes and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_stream_of_another_dtype_is_promoted(dropout_p: float) -> None:
    *inputs, residual = make_inputs(20, 16, n_hidden=32, dtype=torch.bfloat16, has_residual=True)
    out, *grads = results((*inputs, residual.float()), dropout_p=dropout_p)
    exact = [tensor.double() for tensor in (*inputs, residual)]
    assert out.dtype == grads[-1].dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads[:-1])
    assert max_error(out, formula(*exact, dropout_p=dropout_p)) < 0.05


def test_autocast_computes_in_its_dtype() -> None:
    inputs = make_inputs(20, 16, n_hidden=32, has_residual=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, *grads = results(inputs)
        expected = formula(*inputs)
    assert out.dtype == expected.dtype == torch.float32
    assert max_error(out, expected) < 0.05
    assert all(grad.dtype == torch.float32 for grad in grads)
    rounded = [tensor.bfloat16() for tensor in inputs[:5]]
    assert torch.equal(out, fused(*rounded, inputs[5]))


@pytest.mark.parametrize("wrong", range(6))
def test_wrong_shapes_are_named(wrong: int) -> None:
    inputs = list(make_inputs(3, 4, n_hidden=8, has_residual=True))
    inputs[wrong] = torch.zeros([n + 1 for n in inputs[wrong].shape])
    for function in (gelu_mlp, reference.gelu_mlp):
        with pytest.raises(ValueError, match=r"gelu_mlp: .* not .*\(\d, \d\)"):
            function(*inputs[:5], residual=inputs[5])  # pyright: ignore


def test_what_the_kernel_cannot_do_is_refused() -> None:
    x, *weights = make_inputs(3, 4, n_hidden=8)
    with pytest.raises(ValueError, match=r"must share one dtype, not torch\.bfloat16, torch\.float32"):
        fused(x.bfloat16(), *weights)
    with pytest.raises(ValueError, match=r"no kernel for torch\.int64: it takes torch\.float32"):
        fused(x.long(), *(weight.long() for weight in weights))
    with pytest.raises(ValueError, match=r"must be on .*, not on meta"):
        fused(x, *weights, x.to("meta"))
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), not 1\.0"):
        fused(x, *weights, dropout_p=1.0)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        fused(x, *weights, activation="tanh")
    assert supports(x)
    assert not supports(x.long())


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone(wanted: int) -> None:
    inputs = list(make_inputs(9, 16, n_hidden=32, has_residual=True))
    expected = gradients(fused, inputs, [torch.ones(9, 16)])[wanted]
    inputs[wanted].requires_grad_()
    fused(*inputs).backward(torch.ones(9, 16))
    assert torch.equal(inputs[wanted].grad, expected)  # pyright: ignore


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
def test_bug_descriptors_where_rows_are_not_aligned() -> None:
    """Every matrix in turn starts 4 bytes late: pointers take it."""
    inputs = make_inputs(37, 16, n_hidden=48, has_residual=True)
    aligned = results(inputs)
    for late, tensor in enumerate(inputs):
        moved = torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
        assert_same_bits(aligned, results((*inputs[:late], moved, *inputs[late + 1 :])))
