"""A compiled training step: the loss is fused, and logits are returned without being computed."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_to_fp32
from fastgpt_kernels.operations.linear_cross_entropy import reference
from functorch.compile import make_boxed_func
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from readings import READINGS
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.dlpack import to_dlpack

import fastgpt
from fastgpt.model.compiled_logits import NO_PATH, CompiledLogits

N_VOCAB, N_ROWS, N_CHUNK_ROWS = 131, 18, 4


@pytest.fixture(autouse=True, scope="module")
def no_graphs_of_other_tests() -> Iterator[None]:
    """Dynamo compiles one function only so many times in a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that notes the shape of every tensor of the forward and the backward graph."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.names: list[str] = []
        self.backend = aot_autograd(fw_compiler=self._note, bw_compiler=self._note)

    def _note(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.names += [str(node.target) for node in graph.graph.nodes]
        values = [node.meta.get("val") for node in graph.graph.nodes]
        self.shapes += [value.shape for value in values if isinstance(value, Tensor)]
        return make_boxed_func(graph.forward)

    def most_rows_of_logits(self) -> int:
        rows = [shape[:-1].numel() for shape in self.shapes if len(shape) > 1 and shape[-1] == N_VOCAB]
        return max(n for n in rows if n != tiny_config().n_embd)  # without the transposed weight


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", N_CHUNK_ROWS * N_VOCAB)
    return Graphs()


def models() -> tuple[Any, Any, Tensor]:
    theirs, ours = pair(tiny_config(n_layer=1))
    return theirs.train(), ours.train(), token_ids(2, N_ROWS // 2, N_VOCAB)


def of_outputs(model: Any) -> Callable[..., Any]:
    return model


def of_the_loss(model: Any) -> Callable[..., Any]:
    return lambda ids, labels: model(ids, labels=labels).loss


def with_converted_logits(model: Any) -> Callable[..., Any]:
    """As accelerate prepares a model for mixed precision."""
    return lambda ids, labels: convert_to_fp32(model(ids, labels=labels))


@pytest.mark.parametrize("form", [of_outputs, of_the_loss, with_converted_logits])
def test_no_graph_holds_the_logits_of_all_rows(form, graphs: Graphs) -> None:
    theirs, ours, ids = models()
    for dtype in (torch.float32, torch.bfloat16) if form is with_converted_logits else (torch.float32,):
        results = []
        for step in (form(theirs), torch.compile(form(ours), fullgraph=True, backend=graphs.backend)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                result = step(ids, labels=ids)
            (result if isinstance(result, Tensor) else result.loss).backward()
            results.append(result)
        if form is not of_the_loss:
            logits = results[1].logits
            assert type(logits) is CompiledLogits
            assert (logits.shape, logits.dtype) == (results[0].logits.shape, results[0].logits.dtype)
            n_ulps = 64 if dtype == torch.float32 else 2**18  # of float32
            assert_same_within_rounding(logits.detach() + 0, results[0].logits.detach(), n_ulps=n_ulps)
        if dtype == torch.float32:
            for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert graphs.most_rows_of_logits() <= N_CHUNK_ROWS


def test_the_kernel_computes_the_loss(graphs: Graphs) -> None:
    _, ours, ids = models()
    with fastgpt.backend("triton"):
        torch.compile(ours, fullgraph=True, backend=graphs.backend)(ids, labels=ids).loss.backward()
    assert "fastgpt_kernels.linear_cross_entropy_sum.default" in graphs.names
    assert not any(shape[-1:] == (N_VOCAB,) and shape.numel() == N_ROWS * N_VOCAB for shape in graphs.shapes)


def test_bug_every_compiled_step_was_taken_for_an_export(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile, torch 2.11 says that it exports."""
    _, ours, ids = models()
    step = torch.compile(of_the_loss(ours), fullgraph=True, backend=graphs.backend)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    step(ids, labels=ids).backward()
    assert graphs.most_rows_of_logits() <= N_CHUNK_ROWS


def test_bug_memory_of_the_logits_was_at_address_0() -> None:
    _, ours, ids = models()
    logits = torch.compile(ours, fullgraph=True, backend="aot_eager")(ids, labels=ids).logits
    assert type(logits) is CompiledLogits
    with pytest.raises(RuntimeError, match="data pointer"):
        to_dlpack(logits)
    assert torch.equal(torch.from_dlpack(logits.detach()), logits)


def test_a_loss_inside_of_the_graph_reaches_the_weights() -> None:
    theirs, ours, ids = models()

    def distilled(model: Any) -> Callable[[Tensor], Tensor]:
        def loss(ids: Tensor) -> Tensor:
            output = model(ids, labels=ids)
            return output.loss + output.logits.float().softmax(-1).square().sum() + output.logits[:, -1].square().mean()

        return loss

    expected = distilled(theirs)(ids)
    expected.backward()
    result = torch.compile(distilled(ours), fullgraph=True, backend="aot_eager")(ids)
    result.backward()
    assert_same_within_rounding(result.detach(), expected.detach())
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)


LATER_READINGS: dict[str, Callable[[Tensor], Any]] = READINGS | {
    "pickle": lambda logits: pickle.loads(pickle.dumps(logits)),
    "deepcopy": lambda logits: copy.deepcopy(logits.detach()),
    "saved": lambda logits: _saved_and_loaded(logits),
}


def _saved_and_loaded(logits: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    return torch.load(file)


@pytest.fixture(scope="module")
def compiled() -> tuple[Any, Any, Any]:
    theirs, ours, ids = models()
    return theirs(ids, labels=ids).logits, torch.compile(ours, fullgraph=True, backend="aot_eager"), ids


@pytest.mark.parametrize("reading", LATER_READINGS)
def test_reading_outside_of_the_graph(reading: str, compiled) -> None:
    expected, step, ids = compiled
    logits = step(ids, labels=ids).logits
    result = LATER_READINGS[reading](logits)
    assert type(result) is Tensor
    assert_same_within_rounding(result.detach() + 0, LATER_READINGS[reading](expected.detach()), n_ulps=256)


def test_values_are_those_of_the_forward(compiled) -> None:
    """The weights may change before the logits are read, and the logits may be changed in place."""
    expected, step, ids = compiled
    output = step(ids, labels=ids)
    with torch.no_grad():
        weight = step.lm_head.weight
        weight.mul_(2)
        assert_same_within_rounding(output.logits + 0, expected.detach())
        weight.div_(2)
        output.logits.mul_(3)
        assert_same_within_rounding(output.logits + 0, 3 * expected.detach())


def test_a_loss_outside_of_the_graph_is_refused(compiled) -> None:
    _, step, ids = compiled
    output = step(ids, labels=ids)
    with pytest.raises(RuntimeError, match=r"logits_to_keep=0") as error:
        (output.loss + output.logits.square().mean()).backward()
    assert str(error.value) == NO_PATH
    with pytest.raises(RuntimeError):
        output.logits.retain_grad()
    plain = step(ids, labels=ids, logits_to_keep=0)
    plain.logits.square().mean().backward()
    assert type(plain.logits) is Tensor
