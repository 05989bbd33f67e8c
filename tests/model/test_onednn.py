"""The MLP by oneDNN on a CPU: the answers of the reference, and taken only where nobody wants more than values."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, max_error, random, relayout
from fastgpt_kernels import reference
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt import onednn, ops

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def arguments(n_rows: int, n_inputs: int = 257, n_hidden: int = 1030, scale: float = 1.0) -> list[Any]:
    """x, both weights and biases in float64. The weights take more than `_MIN_BYTES` in float32."""
    shapes = (n_rows, n_inputs), (n_inputs, n_hidden), (n_hidden,), (n_hidden, n_inputs), (n_inputs,)
    sizes = scale, n_inputs**-0.5, 0.2, n_hidden**-0.5, 0.2
    return [size * random(*shape, seed=seed) for seed, (shape, size) in enumerate(zip(shapes, sizes, strict=True))]


def in_single(exact: list[Any], kind: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Any]:
    return [kind(tensor.float()) for tensor in exact]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The calls of oneDNN's MLP, which the clock is made to prefer."""
    calls, mlp = [], onednn.gelu_mlp
    monkeypatch.setattr(onednn, "_gain", lambda *_: 2.0)
    monkeypatch.setattr(onednn, "gelu_mlp", lambda *args, **options: calls.append(args) or mlp(*args, **options))
    with fastgpt.backend("auto"):
        yield calls


# --- the answers ----------------------------------------------------------------------------------------------------


def assert_is_the_mlp(fused: Tensor, exact: list[Any], activation: str = "gelu_new") -> None:
    """By the factor rule. How much torch errs depends on the rows that it takes at a time: one, or all."""
    x, *weights = in_single(exact)
    truth = reference.gelu_mlp(*exact, activation=activation)
    eager = reference.gelu_mlp(x, *weights, activation=activation)
    by_row = torch.cat([reference.gelu_mlp(row, *weights, activation=activation) for row in x.split(1)])
    assert_as_accurate(fused, eager, truth, eager_error=max_error(by_row, truth))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu", "relu"])
@pytest.mark.parametrize("n_rows", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@torch.no_grad()
def test_as_accurate_as_eager(scale: float, n_rows: int, activation: str, taken: list[Any]) -> None:
    exact = arguments(n_rows, scale=scale)
    tensors = in_single(exact)
    out = ops.gelu_mlp(*tensors, activation=activation)
    assert_is_the_mlp(out, exact, activation)
    residual = random(n_rows, 257, seed=9).float()
    assert torch.equal(ops.gelu_mlp(*tensors, activation=activation, residual=residual), residual + out)
    assert len(taken) == 2


@pytest.mark.parametrize("layout", ["padded", "transposed", "strided"])
@torch.no_grad()
def test_every_layout(layout: str, taken: list[Any]) -> None:
    exact = arguments(5)
    tensors: list[Any] = [relayout(tensor, layout) for tensor in in_single(exact)]
    assert_is_the_mlp(ops.gelu_mlp(*tensors), exact)
    assert len(taken) == 1


@torch.no_grad()
def test_shapes_and_errors_are_the_references(taken: list[Any]) -> None:
    x, *weights = in_single(arguments(6))
    assert ops.gelu_mlp(x.view(2, 3, 257), *weights).shape == (2, 3, 257)
    for wrong in ([x[:, :-1], *weights], [x, *reversed(weights)]):
        with pytest.raises(ValueError, match=r"gelu_mlp: x must be \(\.\.\., C\)"):
            ops.gelu_mlp(*wrong)
    with pytest.raises(ValueError, match="residual must be"):
        ops.gelu_mlp(x, *weights, residual=x[:2])


@torch.no_grad()
def test_a_model_gives_transformers_logits(taken: list[Any]) -> None:
    theirs, ours = pair(tiny_config(n_embd=256))
    ids = token_ids(2, 24, 131)
    assert_same_within_rounding(ours(ids).logits, theirs(ids).logits, n_ulps=64)
    assert len(taken) == 2


# --- where it is taken ----------------------------------------------------------------------------------------------


def in_half(x: Tensor, *weights: Any) -> Tensor:
    return ops.gelu_mlp(x.bfloat16(), *(weight.bfloat16() for weight in weights)).float()


def traced(*tensors: Any) -> Tensor:
    trace: Any = torch.jit.trace
    return trace(lambda *given: ops.gelu_mlp(*given), tensors, check_trace=False)(*tensors)


class Marked(Tensor):
    """A subclass, which may do something else with the operations."""


def marked(x: Tensor, *weights: Any) -> Tensor:
    return ops.gelu_mlp(x.as_subclass(Marked), *weights).as_subclass(Tensor)


def with_gradients(*tensors: Any) -> Tensor:
    with torch.enable_grad():
        return ops.gelu_mlp(*tensors)


def under_autocast(*tensors: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return ops.gelu_mlp(*tensors).float()


def without_onednn(*tensors: Any) -> Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        return ops.gelu_mlp(*tensors)


def counted(*tensors: Any) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        out = ops.gelu_mlp(*tensors)
    assert counter.get_total_flops() == 2 * 2 * 6 * 257 * 1030
    return out


CASES: dict[str, Callable[..., Tensor]] = {
    "gradients": with_gradients,
    "compile": torch.compile(lambda *tensors: ops.gelu_mlp(*tensors), backend="eager"),
    "trace": traced,
    "autocast": under_autocast,
    "FLOPs counted": counted,
    "vmap": lambda x, *weights: torch.vmap(lambda row: ops.gelu_mlp(row[None], *weights)[0])(x),
    "a subclass": marked,
    "half precision": in_half,
    "activation": lambda *tensors: ops.gelu_mlp(*tensors, activation="silu"),
    "oneDNN off": without_onednn,
    "no rows": lambda x, *weights: ops.gelu_mlp(x[:0], *weights),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_left_to_torch(case: str, taken: list[Any]) -> None:
    tensors = in_single(arguments(6), nn.Parameter)
    out = CASES[case](*tensors)
    assert not taken
    activation = "silu" if case == "activation" else "gelu_new"
    expected = reference.gelu_mlp(*tensors, activation=activation)[: len(out)]
    tolerance = 0.1 if case in ("half precision", "autocast") else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    ops.gelu_mlp(*tensors)
    assert len(taken) == 1


@torch.no_grad()
def test_dropout_is_left_to_torch(taken: list[Any]) -> None:
    tensors = in_single(arguments(6))
    dropped = ops.gelu_mlp(*tensors, dropout_p=0.5, seed=3)
    assert torch.equal(dropped, reference.gelu_mlp(*tensors, dropout_p=0.5, seed=3))
    assert not taken
    ops.gelu_mlp(*tensors, dropout_p=0.0, seed=3)
    assert len(taken) == 1


@torch.no_grad()
def test_a_small_matrix_is_left_to_torch(taken: list[Any]) -> None:
    tensors = in_single(arguments(6, 64, 256))
    assert torch.equal(ops.gelu_mlp(*tensors), reference.gelu_mlp(*tensors))
    assert not taken


@torch.no_grad()
def test_where_it_gains_nothing_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_gain", lambda *_: 1.0)
    tensors = in_single(arguments(6))
    assert torch.equal(ops.gelu_mlp(*tensors), reference.gelu_mlp(*tensors))


def test_the_gain_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of powers of two up to 64 rows, because more rows of larger matrices would take seconds."""
    onednn._gain.cache_clear()
    x, fc_weight, *_ = in_single(arguments(5))
    for n_rows in (5, 6, 8, 64, 65, 1000):
        onednn.gains_in_mlp(x[:1].expand(n_rows, -1), fc_weight, "gelu_new")
    assert onednn._gain.cache_info().misses == 2
    assert 0.05 < onednn._gain(8, 257, 1030, "gelu_new", torch.get_num_threads()) < 50
