"""Which models the engine stands in for, clause by clause: each change is named, at first and after a proof."""

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock
from weakref import ref

import numpy as np
import pytest
import torch
from changes import HOOKED, Change, OtherParameter, StandsForAFunction, hook_everywhere, of_subclass, some_hook
from models import tiny_config
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as hf

import fastgpt
from fastgpt.generate import routing
from fastgpt.model import twin


def model_of(**changes: Any) -> Any:
    torch.manual_seed(0)
    return fastgpt.GPT2LMHeadModel(tiny_config(**changes)).eval()


def wrong_config(model: Any, stack: ExitStack) -> None:
    model.config.n_head = 5


def one_more(model: Any, stack: ExitStack) -> None:
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))


def twice(model: Any, stack: ExitStack) -> None:
    model.transformer.h[1] = model.transformer.h[0]


def fewer(model: Any, stack: ExitStack) -> None:
    model.transformer.h = model.transformer.h[:1].eval()


def in_another_order(model: Any, stack: ExitStack) -> None:
    children = model.transformer.h[0]._modules
    children["ln_1"] = children.pop("ln_1")


def equal_but_another(model: Any, stack: ExitStack) -> None:
    """A module whose namespace is that of the one in its place, but for a table of its own."""
    dropout = copy.copy(model.transformer.drop)
    dropout.p = 0.5
    model.transformer.drop = dropout


def its_own_config(model: Any, stack: ExitStack) -> None:
    attention = model.transformer.h[0].attn
    attention.config = copy.deepcopy(attention.config)
    attention.config.reorder_and_upcast_attn = True


def parameter(path: str, make: Callable[[Tensor], nn.Parameter | None]) -> Change:
    owner, name = path.rsplit(".", 1)

    def change(model: Any, stack: ExitStack) -> None:
        table = model.get_submodule(owner)._parameters
        table[name] = make(table[name].data)

    return change


def renamed(model: Any, stack: ExitStack) -> None:
    table = model.get_submodule(NORM)._parameters
    table["gain"], table["bias"] = table.pop("weight"), table.pop("bias")


def replaced_in(owner: Any, name: str) -> Change:
    return lambda model, stack: stack.enter_context(mock.patch.object(owner, name, some_hook))


def wrapped_in(owner: Any, name: str) -> Change:
    wrapper = StandsForAFunction(getattr(owner, name))
    return lambda model, stack: stack.enter_context(mock.patch.object(owner, name, wrapper))


def attribute(path: str, name: str, value: Any) -> Change:
    return lambda model, stack: setattr(model.get_submodule(path), name, value)


def hooks_of_its_own(model: Any, stack: ExitStack) -> None:
    model.get_submodule(NORM)._forward_hooks = {0: some_hook}


def copied_and_changed(model: Any, stack: ExitStack) -> None:
    """A namespace that was equal when the model was last looked at, and is changed now."""
    norm = model.get_submodule(NORM)
    norm.__dict__ = dict(vars(norm))
    routing.why_not_model(model)
    norm.eps = 0.5


def namespace(model: Any, stack: ExitStack) -> None:
    """All attributes of a module exchanged at once."""
    dropout = model.transformer.drop
    dropout.__dict__ = vars(dropout) | {"p": 0.5}


NORM = "transformer.h.1.ln_1"
REASONS: dict[str, tuple[Change, str]] = {
    "a hook everywhere": (hook_everywhere, "a hook is set on every module"),
    "no configuration": (wrong_config, "its configuration describes no model: "),
    "one block more": (one_more, "transformer.h.2 is not in a GPT-2 of this configuration"),
    "a block twice": (twice, "transformer.h.1 is the same module as transformer.h.0"),
    "a block missing": (fewer, "transformer.h.1 is missing"),
    "another order": (in_another_order, "its modules are in another order"),
    "another dtype": (lambda model, _: model.transformer.ln_f.bfloat16(), "the parameters differ in device or dtype"),
    "another device": (lambda model, _: model.transformer.ln_f.to("meta"), "the parameters differ in device or dtype"),
    "a function": (replaced_in(GenerationMixin, "_prefill"), "GenerationMixin._prefill was replaced"),
    "a function of a part": (replaced_in(nn.Dropout, "forward"), "Dropout.forward was replaced"),
    "a wrapper equal to a function": (wrapped_in(GenerationMixin, "_sample"), "GenerationMixin._sample was replaced"),
    "a subclass of the model": (of_subclass, "the model is not a plain module: Special"),
    "a subclass": (
        lambda model, stack: of_subclass(model.transformer.drop, stack),
        "transformer.drop is not a plain module: Special",
    ),
    "another module": (equal_but_another, "transformer.drop is not a plain module: its p was changed"),
    "hooks of its own": (hooks_of_its_own, f"{NORM} is not a plain module: it has hooks"),
    "a copied namespace": (copied_and_changed, f"{NORM} is not a plain module: its eps was changed"),
    "all attributes": (namespace, "transformer.drop is not a plain module: its p was changed"),
    "training": (lambda model, _: model.transformer.drop.train(), "transformer.drop is in training mode"),
    "another config": (its_own_config, "transformer.h.0.attn is not a plain module: its config was changed"),
    "an attribute": (attribute(NORM, "eps", 0.5), f"{NORM} is not a plain module: its eps was changed"),
    "a tensor for a number": (
        attribute(NORM, "eps", torch.ones(2)),
        f"{NORM} is not a plain module: its eps was changed",
    ),
    "an array for a number": (
        attribute(NORM, "eps", np.ones(2)),
        f"{NORM} is not a plain module: its eps was changed",
    ),
    "an attribute more": (attribute(NORM, "gain", 2), f"{NORM} is not a plain module: its gain was changed"),
    "an attribute less": (
        lambda model, _: delattr(model.get_submodule(NORM), "eps"),
        f"{NORM} is not a plain module: its eps was changed",
    ),
    "a function of the model": (attribute("", "_prefill", some_hook), "the model is not a plain module: its _prefill"),
    "parameters of another type": (
        parameter(f"{NORM}.weight", OtherParameter),
        f"{NORM} is not a plain module: its parameters differ",
    ),
    "parameters of another shape": (
        parameter(f"{NORM}.weight", lambda x: nn.Parameter(x[:1])),
        f"{NORM} is not a plain module: its parameters differ",
    ),
    "a parameter less": (
        parameter(f"{NORM}.bias", lambda _: None),
        f"{NORM} is not a plain module: its parameters differ",
    ),
    "a parameter more": (
        lambda model, _: model.get_submodule(NORM).register_parameter("gain", nn.Parameter(torch.ones(1))),
        f"{NORM} is not a plain module: its parameters differ",
    ),
    "a parameter of another name": (renamed, f"{NORM} is not a plain module: its parameters differ"),
    "data of another shape": (
        lambda model, _: setattr(model.transformer.h[0].attn.c_proj.bias, "data", torch.ones(1)),
        "transformer.h.0.attn.c_proj is not a plain module: its parameters differ",
    ),
    "data of another dtype": (
        lambda model, _: setattr(model.transformer.ln_f.bias, "data", torch.ones(64, dtype=torch.float64)),
        "the parameters differ in device or dtype",
    ),
    "a bias where there was none": (
        lambda model, _: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(131))),
        "lm_head is not a plain module: its parameters differ",
    ),
    "a head of its own, of another dtype": (
        lambda model, _: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.double())),
        "the parameters differ in device or dtype",
    ),
    "a buffer": (
        lambda model, _: model.transformer.drop.register_buffer("mask", torch.ones(1)),
        "transformer.drop is not a plain module: it has buffers",
    ),
    **{
        name: (
            lambda model, stack, hook=hook: hook(model.get_submodule(NORM), stack),
            f"{NORM} is not a plain module: it has hooks",
        )
        for name, hook in HOOKED.items()
    },
}


@pytest.fixture
def in_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("when", ["at first", "after a proof"])
@pytest.mark.parametrize("what", REASONS)
def test_a_changed_model_is_not_taken_and_the_reason_is_named(what: str, when: str, in_inference: None) -> None:
    change, reason = REASONS[what]
    model = model_of()
    if when == "after a proof":
        assert routing.why_not_model(model) is None
    with ExitStack() as stack:
        change(model, stack)
        found = routing.why_not_model(model)
        assert found is not None
        assert found.startswith(reason)
        assert routing.describe(model) == f"transformers' loop: {found}"


def test_explain_names_all_that_is_called_instead_of_read() -> None:
    model = model_of()
    assert fastgpt.explain(model) == "the engine: static cache, torch operations"
    model.get_submodule(NORM).register_forward_hook(some_hook)
    model.transformer.drop.train()
    assert fastgpt.explain(model).splitlines() == [
        "transformers' loop: transformer.drop is in training mode",
        f"{NORM} is not a plain module: it has hooks",
    ]
    model.__class__ = type("Special", (type(model),), {})
    assert fastgpt.explain(model) == "transformers' loop: the model is not a plain module: Special"


def test_what_nothing_reads_may_change_in_a_model(in_inference: None) -> None:
    model = model_of()
    assert routing.why_not_model(model) is None
    model.a_note = "words"
    model.transformer.h[0].attn._is_hf_initialized = True
    model.lm_head.requires_grad_(False)
    model.transformer.ln_f.weight.data = torch.ones(64)
    assert routing.why_not_model(model) is None


def test_where_the_call_stands() -> None:
    model = model_of()
    assert routing.why_not_model(model) == "gradients are asked for"
    with torch.no_grad():
        assert routing.why_not_model(model) is None
        with torch.autocast("cpu"):
            assert routing.why_not_model(model) == "autocast is on"
        model.set_attn_implementation("eager")
        assert routing.why_not_model(model) == "the attention is 'eager'"
        other = model_of(activation_function="tanh")
        assert routing.why_not_model(other) == "Tanh is an activation that the engine does not know"


def test_a_module_may_give_way_to_its_equal(in_inference: None) -> None:
    model = model_of()
    assert routing.why_not_model(model) is None
    kept = model.transformer.h[0].ln_2
    model.transformer.h[0].ln_2 = copy.deepcopy(kept)
    assert routing.why_not_model(model) is None


def test_a_table_of_equal_parameters_of_one_element_is_looked_at(in_inference: None) -> None:
    """In a model of one channel they compare as equal to those that were there, and may have another dtype."""
    model: Any = fastgpt.GPT2LMHeadModel(tiny_config(n_embd=1, n_head=1)).eval()
    assert twin.difference(model) is None
    norm = model.transformer.ln_f
    norm._parameters = {name: nn.Parameter(tensor.double()) for name, tensor in norm._parameters.items()}
    assert twin.difference(model) == "the parameters differ in device or dtype"


def test_a_model_is_compared_with_its_twin_once(in_inference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert routing.why_not_model(model) is None
    monkeypatch.delattr(twin, "_twin")
    assert routing.why_not_model(model) is None


def test_the_proof_of_a_model_holds_in_inference_mode_and_outside(in_inference: None, monkeypatch) -> None:
    model = model_of()
    assert routing.why_not_model(model) is None
    monkeypatch.setattr(twin, "differences", None)  # a second comparison would raise
    for is_inference in (True, False, True):
        with torch.inference_mode(is_inference):
            assert twin.difference(model) is None


def test_a_model_that_differs_needs_one_twin_until_its_configuration_changes(in_inference: None, monkeypatch) -> None:
    model, build, n_built = model_of(), twin._twin, []
    monkeypatch.setattr(twin, "_twin", lambda config: [build(config), n_built.append(1)][0])
    model.transformer.drop.train()
    for _ in range(3):
        assert routing.why_not_model(model) is not None
    model.config.n_layer = 1
    assert routing.why_not_model(model) is not None
    assert len(n_built) == 2


def test_the_proof_frees_what_is_replaced(in_inference: None) -> None:
    model = model_of()
    assert routing.why_not_model(model) is None
    weight = ref(model.transformer.h[1].attn.c_attn.weight)
    model.transformer.h[1] = nn.Identity()
    assert weight() is None
    assert model not in twin._proofs


def test_bug_first_calls_in_two_threads_left_all_later_models_without_weights(in_inference: None, monkeypatch) -> None:
    """A twin is built without a change that other threads see, such as to the functions that initialise weights."""
    model, seen, make = model_of(), [], hf.GPT2MLP.__init__

    def shared_by_threads() -> list[Any]:
        return [*vars(nn.init).values(), *vars(PreTrainedModel).values()]

    def noted(*args: Any) -> None:
        seen.append(shared_by_threads())
        make(*args)

    monkeypatch.setattr(hf.GPT2MLP, "__init__", noted)
    before, state = shared_by_threads(), torch.get_rng_state()
    assert routing.why_not_model(model) is None
    assert len(seen) == model.config.n_layer
    assert all(all(map(operator.is_, before, during)) for during in seen)
    assert torch.equal(torch.get_rng_state(), state)
