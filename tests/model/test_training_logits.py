"""The logits of a training step: what transformers gives, however they are read, and computed only then."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from readings import READINGS
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils._pytree import tree_leaves
from torch.utils.dlpack import from_dlpack, to_dlpack
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

import fastgpt
from fastgpt.model import outputs


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """An entry for every product of the head that was computed."""
    compute, calls = outputs._Product.compute, []
    monkeypatch.setattr(outputs._Product, "compute", lambda product: [calls.append(1), compute(product)][1])
    return calls


def steps(**changes) -> tuple[Any, Any, Any, Any]:
    """Both models, and what each returns for the same batch with labels."""
    theirs, ours = pair(tiny_config(**changes))
    ids = token_ids(2, 9, 131)
    return theirs, ours, theirs.train()(ids, labels=ids), ours.train()(ids, labels=ids)


def test_what_needs_no_values_computes_nothing(computed) -> None:
    _, _, expected, output = steps()
    for logits, theirs in (
        (output.logits, expected.logits),
        (output.logits.float(), expected.logits.float()),
        (output.logits.to(torch.bfloat16), expected.logits.to(torch.bfloat16)),
        (output.logits.detach(), expected.logits.detach()),
        (output.logits.clone(), expected.logits.clone()),
    ):
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout", "nbytes", "_base"):
            assert getattr(logits, name) == getattr(theirs, name), name
        assert (len(logits), logits.stride(), logits.numel()) == (len(theirs), theirs.stride(), theirs.numel())
        assert (logits.is_contiguous(), torch.is_floating_point(logits), logits in {logits}) == (True, True, True)
        assert (logits.grad_fn is None) == (theirs.grad_fn is None)
    output.loss.backward()
    assert not computed


def test_every_container_holds_the_tensor(computed) -> None:
    _, ours, expected, output = steps()
    assert type(output) is CausalLMOutputWithCrossAttentions
    assert list(output.keys()) == list(expected.keys())
    as_tuple = ours(token_ids(2, 9, 131), labels=token_ids(2, 9, 131), return_dict=False)
    held = [output["logits"], output.get("logits"), output[1], output.to_tuple()[1], list(output.values())[1]]
    held += [dict(output.items())["logits"], vars(output)["logits"], tree_leaves(output)[1], as_tuple[1]]
    assert not computed
    for logits in held:
        assert isinstance(logits, Tensor)
        assert_same_within_rounding(logits + 0, expected.logits + 0)
    assert len(computed) == 2, "once a forward"
    saved = io.BytesIO()
    torch.save(output.logits, saved)
    saved.seek(0)
    assert output.logits is not None
    for logits in (pickle.loads(pickle.dumps(output)).logits, torch.load(saved), copy.deepcopy(output.logits.detach())):
        assert type(logits) is Tensor
        assert torch.equal(logits, output.logits.detach())


def traced(function: Callable, *logits: Tensor) -> Any:
    module: Any = torch.jit.trace(function, logits)
    return module(*logits)


EAGER_READINGS: dict[str, Callable[[Tensor], Any]] = READINGS | {
    "iteration": lambda logits: list(logits)[1],
    "cross-entropy": lambda logits: F.cross_entropy(logits.flatten(0, 1), torch.arange(18)),
    "vmap": lambda logits: torch.vmap(lambda row: row.log_softmax(-1).sum())(logits),
    "compiled": lambda logits: torch.compile(lambda x: x.log_softmax(-1).sum(), backend="aot_eager")(logits),
    "traced": lambda logits: traced(lambda x: x.log_softmax(-1).sum(), logits),
    "traced twice": lambda logits: traced(lambda x, y: x * y, logits, logits.detach()),
    "vjp": lambda logits: torch.autograd.functional.vjp(lambda x: x.square().sum(), logits)[1],
    "in place": lambda logits: logits.mul_(2),
    "augmented": lambda logits: logits.__iadd__(3),
    "gradient": lambda logits: torch.autograd.grad(logits.square().sum(), logits)[0],
}


@pytest.mark.parametrize("reading", EAGER_READINGS)
def test_reading(reading: str) -> None:
    _, _, expected, output = steps()
    theirs, ours = EAGER_READINGS[reading](expected.logits), EAGER_READINGS[reading](output.logits)
    assert ours.requires_grad == theirs.requires_grad
    assert_same_within_rounding(ours.detach() + 0, theirs.detach(), n_ulps=256)
    assert_same_within_rounding(output.logits.detach() + 0, expected.logits.detach())


def assert_same_gradients(theirs: Any, ours: Any) -> None:
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_read_first_without_gradients(first, computed) -> None:
    """The metric of a Trainer's subclass: what follows still has the whole graph."""
    theirs, ours, *both = steps()
    for output in both:
        with first():
            assert output.logits.argmax(-1).shape == (2, 9)
        (output.loss + output.logits.square().mean()).backward()
    assert_same_gradients(theirs, ours)
    assert len(computed) == 1


def test_change_in_place_keeps_the_graph() -> None:
    theirs, ours, *both = steps()
    for output in both:
        output.logits[:, -1] = 0
        output.logits.mul_(2)
        output.logits.square().mean().backward()
    assert_same_within_rounding(both[1].logits.detach() + 0, both[0].logits.detach())
    assert_same_gradients(theirs, ours)


def test_conversion_is_not_changed_in_place() -> None:
    for output in steps()[2:]:
        before, converted, copied = output.logits.tolist(), output.logits.double(), output.logits.clone()
        output.logits.detach().mul_(2)
        assert torch.equal(converted.float(), torch.tensor(before))
        assert torch.equal(copied, torch.tensor(before))
        assert torch.equal(output.logits, 2 * torch.tensor(before))


def fused_adamw(model: Any) -> None:
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def sgd(model: Any) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def through_data(model: Any) -> None:
    model.lm_head.weight.data.neg_()


def through_numpy(model: Any) -> None:
    model.lm_head.weight.detach().numpy()[:] = 0


def other_data(model: Any) -> None:
    model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)


def other_mode(model: Any) -> None:
    model.eval().half()


@pytest.mark.parametrize("change", [sgd, fused_adamw, through_data, through_numpy, other_data, other_mode])
def test_logits_are_those_of_the_weights_of_the_forward(change: Callable[[Any], None]) -> None:
    theirs, ours, expected, output = steps()
    for model, step in ((theirs, expected), (ours, output)):
        step.loss.backward()
        change(model)
    assert_same_within_rounding(output.logits.detach() + 0, expected.logits.detach())


def test_changed_hidden_states_are_refused() -> None:
    _, ours = pair(tiny_config())
    output = ours.train()(token_ids(2, 9, 131), labels=token_ids(2, 9, 131), output_hidden_states=True)
    output.hidden_states[-1].detach().zero_()
    with pytest.raises(RuntimeError, match="logits_to_keep=0"):
        output.logits.sum()


def test_data_cannot_be_replaced() -> None:
    output = steps()[-1]
    with pytest.raises(AttributeError, match="data"):
        output.logits.data = torch.zeros(2, 9, 131)


def test_memory_that_is_asked_for_without_a_call_of_torch() -> None:
    """`to_dlpack` and extensions in C++ read address 0, where the process ended."""
    output = steps()[-1]
    with pytest.raises(RuntimeError, match="data pointer"):
        to_dlpack(output.logits)
    assert torch.equal(torch.from_dlpack(output.logits.detach()), output.logits)
    plain = to_dlpack(output.logits.detach().clone() + 0)
    assert torch.equal(from_dlpack(plain), output.logits)


def retained(output: Any, loss: Tensor) -> Tensor:
    output.logits.retain_grad()
    loss.backward()
    return output.logits.grad


def hooked(output: Any, loss: Tensor) -> Tensor:
    seen: list[Tensor] = []
    output.logits.register_hook(seen.append)
    output.logits = None
    loss.backward()
    assert len(seen) == 1
    return seen[0]


def hooked_together(output: Any, loss: Tensor) -> Tensor:
    seen: list[Tensor] = []
    torch.autograd.graph.register_multi_grad_hook([output.logits], lambda grads: seen.extend(grads))
    loss.backward()
    return seen[0]


def changed_by_a_hook(output: Any, loss: Tensor) -> Tensor:
    output.logits.register_hook(lambda dlogits: 2 * dlogits)
    return retained(output, loss)


def asked(output: Any, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, output.logits)[0]


def backward_to(output: Any, loss: Tensor) -> Tensor:
    loss.backward(inputs=[output.logits])
    return output.logits.grad


WAITING = [retained, hooked, hooked_together, changed_by_a_hook, asked, backward_to]


@pytest.mark.parametrize("own_loss", [0.0, 0.5])
@pytest.mark.parametrize("way", WAITING)
def test_gradient_of_the_loss_with_respect_to_the_logits(way: Callable, own_loss: float, computed) -> None:
    theirs, ours, *both = steps()
    expected, gradient = [
        way(step, step.loss + own_loss * step.logits.square().mean() if own_loss else step.loss) for step in both
    ]
    assert_same_within_rounding(gradient, expected, n_ulps=1024)
    assert len(computed) == 1
    if way not in (asked, backward_to):
        assert_same_gradients(theirs, ours)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_gradient_of_other_losses_with_respect_to_the_logits(options: dict[str, Any]) -> None:
    ids = token_ids(2, 9, 131)
    gradients = []
    for how in ({"logits_to_keep": 0}, {}):
        model = pair(tiny_config())[1].train()
        model.loss_function = fastgpt.CausalLMLoss(**options)
        output = model(ids, labels=ids, shift_labels=ids.flip(1), num_items_in_batch=torch.tensor(7), **how)
        gradients.append(torch.autograd.grad(output.loss.square().sum(), output.logits)[0])
    assert_same_within_rounding(gradients[1], gradients[0], n_ulps=1024)


def test_labels_that_changed_since() -> None:
    gradients = []
    for model in pair(tiny_config()):
        ids = token_ids(2, 9, 131)
        labels = ids.clone()
        output = model.train()(ids, labels=labels)
        labels.zero_()
        gradients.append(torch.autograd.grad(output.loss, output.logits)[0])
    assert_same_within_rounding(gradients[1], gradients[0], n_ulps=1024)


def test_a_second_step_waits_for_nothing(computed) -> None:
    """What was asked for in one call of autograd is not computed in the next."""
    output = steps()[-1]
    torch.autograd.grad(output.loss, output.logits, retain_graph=True)
    output.logits.register_hook(lambda dlogits: pytest.fail("removed")).remove()
    (dweight,) = torch.autograd.grad(output.loss, steps()[1].lm_head.weight, retain_graph=True, allow_unused=True)
    assert dweight is None
    assert len(computed) == 1


@pytest.mark.parametrize("compiler", [lambda graph: graph, torch.compile(backend="eager")])
def test_backward_under_compiled_autograd(compiler: Callable, computed) -> None:
    """It adds up gradients without asking whether one is None, as that of logits is which nobody reads."""
    theirs, ours, *both = steps()
    for step in both:
        with compiled_autograd._enable(compiler):
            step.loss.backward()
    assert_same_gradients(theirs, ours)
    assert not computed


def test_hooks_of_frameworks_compute_nothing(computed) -> None:
    """FSDP and Lightning's Fabric hook every output to see that backward begins, and ignore the gradient."""

    def watch(requires_backward: bool, *_: Any) -> None:
        started.append(requires_backward)

    for module in ("torch.distributed.fsdp._runtime_utils", "lightning.fabric.wrappers", "lightning_fabric.wrappers"):
        started: list[bool] = []
        watch.__module__ = module
        theirs, ours, *both = steps()
        for output in both:
            for tensor in (output.loss, output.logits):
                tensor.register_hook(partial(watch, False))
            output.loss.backward()
        assert len(started) == 4
        assert_same_gradients(theirs, ours)
    assert not computed


def test_what_has_no_gradient_through_the_logits_is_refused() -> None:
    output = steps()[-1]
    with pytest.raises(RuntimeError, match=r"no second derivative.*logits_to_keep=0"):
        torch.autograd.grad(output.loss, output.logits, create_graph=True)
    output.logits.retain_grad()
    output.logits.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place.*logits_to_keep=0"):
        output.loss.backward()


def test_gradients_of_a_loss_on_the_logits() -> None:
    """Hooks and retain_grad on logits that a user's own loss reads, and a hook that is gone before backward."""
    seen, retained = [], []
    for output in steps()[2:]:
        output.logits.register_hook(seen.append)
        output.logits.retain_grad()
        output.logits.square().sum().backward()
        retained.append(output.logits.grad)
    assert_same_within_rounding(seen[1], seen[0])
    assert_same_within_rounding(retained[1], retained[0])
    output = steps()[3]
    output.logits.register_hook(seen.append).remove()
    output.loss.backward()
    assert len(seen) == 2


def test_memory_is_given_back() -> None:
    """Once the logits are read or dropped, nothing holds the copy of the weight, not even the graph of the loss."""
    read, dropped, asked = (steps()[-1] for _ in range(3))
    held = [weakref.ref(output.logits._product.factors[1]) for output in (read, dropped)]
    read.logits.sum()
    torch.autograd.grad(asked.loss, asked.logits, retain_graph=True)
    held.append(weakref.ref(asked.logits._product.value))
    losses = dropped.loss, asked.loss
    del dropped, asked
    assert [tensor() for tensor in held] == [None, None, None]
    for loss in losses:
        loss.backward()


def test_float64_loss_is_transformers() -> None:
    theirs, ours = (model.double() for model in pair(tiny_config()))
    ids = token_ids(2, 9, 131)
    expected, loss = theirs.train()(ids, labels=ids).loss, ours.train()(ids, labels=ids).loss
    assert loss.dtype == expected.dtype
    assert_same_within_rounding(loss.detach(), expected.detach())
