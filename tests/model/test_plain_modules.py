"""What may be read directly, clause by clause: of modules, and of the functions of their classes."""

import compileall
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial, partialmethod, wraps
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any
from unittest import mock

import fastgpt_kernels
import pytest
import torch
from changes import HOOKED, Change, OtherParameter, StandsForAFunction, hook_everywhere, of_subclass, some_hook
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

import fastgpt
from fastgpt.model import plain
from fastgpt.model.blocks import LayerNorm

# --- modules --------------------------------------------------------------------------------------------------------


def example(kind: type[nn.Module]) -> nn.Module:
    made: dict[type[nn.Module], Callable[[], nn.Module]] = {
        Conv1D: lambda: Conv1D(3, 2),
        LayerNorm: lambda: LayerNorm(4),
        nn.Linear: lambda: nn.Linear(2, 3, bias=False),
    }
    return made.get(kind, kind)()


KINDS = [Conv1D, LayerNorm, nn.Linear, nn.Dropout, NewGELUActivation, nn.ReLU]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_just_made_is_plain(kind: type[nn.Module]) -> None:
    assert plain.is_plain(example(kind), kind)
    assert plain._is_plain_to_dynamo(example(kind), kind)


def hidden(name: str) -> Change:
    return lambda module, stack: module.__dict__.update({name: some_hook})


NOT_PLAIN: dict[str, Change] = HOOKED | {
    "a hook everywhere": hook_everywhere,
    "a subclass": of_subclass,
    "forward of the instance": hidden("forward"),
}


@pytest.mark.parametrize("change", NOT_PLAIN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [plain.is_plain, plain._is_plain_to_dynamo])
def test_a_changed_module_is_not_plain(kind: type[nn.Module], change: str, rule: Callable[..., bool]) -> None:
    module = example(kind)
    with ExitStack() as stack:
        NOT_PLAIN[change](module, stack)
        assert not rule(module, kind)


@pytest.mark.parametrize(
    "name", ["__call__", "_wrapped_call_impl", "_call_impl", "forward", "__getattr__", "__getattribute__"]
)
def test_what_a_call_runs_may_not_be_hidden_or_replaced(name: str) -> None:
    module, original = example(Conv1D), getattr(Conv1D, name)
    with mock.patch.object(Conv1D, name, lambda *args: original(*args)):
        assert not plain.is_plain(module, Conv1D)
        assert not plain.is_as_imported(Conv1D)
    assert plain.is_plain(module, Conv1D)
    assert plain.is_as_imported(Conv1D)
    module.__dict__[name] = some_hook
    assert not plain.is_plain(module, Conv1D)


def set_parameter(name: str, value: Any) -> Change:
    return lambda module, stack: module._parameters.__setitem__(name, value)


def renamed(module: Any, stack: ExitStack) -> None:
    module._parameters["gain"] = module._parameters.pop("weight")


PARAMETERS: dict[str, Change] = {
    "another type": set_parameter("weight", OtherParameter(torch.ones(2, 3))),
    "another shape": set_parameter("weight", nn.Parameter(torch.ones(3, 2))),
    "another shape of the bias": set_parameter("bias", nn.Parameter(torch.ones(1))),
    "none": set_parameter("bias", None),
    "one more": set_parameter("scale", nn.Parameter(torch.ones(1))),
    "another name": renamed,
}


@pytest.mark.parametrize("change", PARAMETERS)
def test_parameters_are_those_of_the_constructor(change: str) -> None:
    module = example(Conv1D)
    with ExitStack() as stack:
        PARAMETERS[change](module, stack)
        assert not plain.is_plain(module, Conv1D)


def test_a_parameter_of_another_type_is_not_read_by_compiled_code() -> None:
    module: Any = example(Conv1D)
    module.weight = OtherParameter(module.weight.data)
    assert not plain._is_plain_to_dynamo(module, Conv1D)


def test_a_bias_where_the_constructor_made_none() -> None:
    module: Any = example(nn.Linear)
    module.bias = nn.Parameter(torch.ones(3))
    assert not plain.is_plain(module, nn.Linear)


def test_parameters_that_a_wrapper_has_gathered_are_read_where_they_lie() -> None:
    module: Any = example(Conv1D)
    weight, bias = module._parameters.pop("weight"), module._parameters.pop("bias")
    module.__dict__["weight"], module._parameters["bias"] = weight.detach(), bias
    assert plain.is_plain(module, Conv1D)
    module.__dict__["weight"] = weight.detach().t()
    assert not plain.is_plain(module, Conv1D)


def test_attributes_other_than_sizes_are_fixed() -> None:
    dropout, norm = nn.Dropout(0.3), LayerNorm(4, eps=0.5)
    assert plain.is_plain(dropout, nn.Dropout)
    assert plain.is_plain(norm, LayerNorm)
    dropout.inplace, norm.elementwise_affine = True, False
    assert not plain.is_plain(dropout, nn.Dropout)
    assert not plain.is_plain(norm, LayerNorm)


def test_a_parameter_where_the_constructor_made_none() -> None:
    module = nn.Dropout()
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert not plain.is_plain(module, nn.Dropout)


def test_an_activation_that_is_changed_is_not_fused() -> None:
    act: Any = GELUActivation()
    act.register_forward_hook(some_hook)
    assert plain.fused_activation(act) is None


def test_what_is_compiled_is_judged_as_dynamo_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module = example(Conv1D)
    assert plain.is_plain(module, Conv1D)
    assert plain.is_as_imported(Conv1D)
    assert plain.fused_activation(GELUActivation(use_gelu_python=True)) is None
    module.register_forward_hook(some_hook)
    assert not plain.is_plain(module, Conv1D)


def test_an_activation_in_python_is_not_fused() -> None:
    assert plain.fused_activation(GELUActivation()) == "gelu"
    assert plain.fused_activation(GELUActivation(use_gelu_python=True)) is None
    act: Any = GELUActivation()
    act.act = MethodType(lambda self, x: x, act)
    assert plain.fused_activation(act) is None
    assert plain.fused_activation(nn.Tanh()) is None


@pytest.mark.parametrize(
    ("value", "other", "is_same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (1, True, False),
        (partial(dict, []), partial(dict, []), True),
        (partial(dict, []), partial(dict, [(1, 2)]), False),
        (partial(dict, []), partial(set, []), False),
        (partial(dict, key=1), partial(dict, key=2), False),
    ],
)
def test_same(value: Any, other: Any, is_same: bool) -> None:
    assert plain.same(value, other) is is_same


# --- classes --------------------------------------------------------------------------------------------------------


def replaced(kind: type, name: str, value: Any) -> list[str]:
    with mock.patch.object(kind, name, value, create=True):
        return list(plain.changes_of_class(kind))


def test_functions_of_a_class_are_those_seen_at_import() -> None:
    kind = fastgpt.GPT2LMHeadModel
    assert list(plain.changes_of_class(kind)) == []
    assert replaced(kind, "forward", some_hook) == ["GPT2LMHeadModel.forward was replaced"]
    assert replaced(kind, "device", property(some_hook)) == ["GPT2LMHeadModel.device was replaced"]
    assert replaced(kind, "__eq__", some_hook) == ["GPT2LMHeadModel.__eq__ was replaced"]
    with mock.patch.object(nn.Module, "parameters", some_hook):
        assert list(plain.changes_of_class(kind)) == ["Module.parameters was replaced"]
    with mock.patch.object(nn.Module, "parameters", 3):
        assert list(plain.changes_of_class(kind)) == ["Module.parameters was replaced"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("note", some_hook), ("_keys_to_ignore_on_save", []), ("__doc__", "words"), ("__init__", some_hook)],
)
def test_what_nothing_reads_may_change_in_a_class(name: str, value: Any) -> None:
    assert replaced(fastgpt.GPT2LMHeadModel, name, value) == []


def test_functions_that_were_foreign_when_a_class_was_first_seen() -> None:
    class Foreign(nn.ReLU):
        @property
        def said(self) -> int:
            return 1

        def forward(self, input: Tensor) -> Tensor:
            return input

    plain.watch(Foreign)
    assert {*plain.changes_of_class(Foreign)} == {f"Foreign.{name} was replaced" for name in ("said", "forward")}
    assert not plain.is_as_imported(Foreign)


def defined_in(module: str) -> Callable:
    return FunctionType(some_hook.__code__, {"__name__": module})


THEIRS, FOREIGN = defined_in("torch.nn.modules.linear"), defined_in("instrument")


@pytest.mark.parametrize(
    ("value", "is_foreign"),
    [
        (THEIRS, False),
        (contextmanager(THEIRS), False),
        (lru_cache(THEIRS), False),
        (classmethod(THEIRS), False),
        (property(THEIRS), False),
        (FOREIGN, True),
        (wraps(THEIRS)(FOREIGN), True),
        (contextmanager(FOREIGN), True),
        (lru_cache(FOREIGN), True),
        (partialmethod(FOREIGN, 1), True),
        (staticmethod(FOREIGN), True),
        (property(THEIRS, FOREIGN), True),
        (StandsForAFunction(THEIRS), True),
        (defined_in("torch_geometric.nn"), True),
        (defined_in("__main__"), True),
        (FunctionType(some_hook.__code__, {}), True),
        (5, False),
        (nn.Linear, False),
    ],
)
def test_only_code_of_torch_transformers_and_python_belongs_to_a_class(value: Any, is_foreign: bool) -> None:
    assert plain._is_from_elsewhere(value) is is_foreign


def test_bug_a_wrapper_that_is_equal_to_what_it_wraps_was_not_called() -> None:
    module = Conv1D(3, 2)
    with mock.patch.object(Conv1D, "forward", StandsForAFunction(Conv1D.forward)):
        assert not plain.is_as_imported(Conv1D)
        assert not plain.is_plain(module, Conv1D)
        assert list(plain.changes_of_class(Conv1D)) == ["Conv1D.forward was replaced"]
    assert plain.is_as_imported(Conv1D)
    assert plain.is_plain(module, Conv1D)
    assert list(plain.changes_of_class(Conv1D)) == []


REPLACES_AND_IMPORTS = """
import torch, transformers
from transformers.pytorch_utils import Conv1D

original = Conv1D.forward
Conv1D.forward = lambda self, x: 1.1 * original(self, x)

import fastgpt

ours, _ = fastgpt.load_demo()
theirs = transformers.GPT2LMHeadModel(ours.config).eval()
theirs.load_state_dict(ours.state_dict())
tokens = torch.arange(9)[None]
torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)
assert "Conv1D.forward was replaced" in fastgpt.explain(ours)
"""


def run_in_a_new_process(code: str, path: str | None = None) -> None:
    environment = os.environ | {"PYTHONPATH": path or os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True)


def test_bug_a_function_replaced_in_the_interpreter_before_the_import_was_not_called() -> None:
    """Its code has no file."""
    run_in_a_new_process(REPLACES_AND_IMPORTS)


LOADS_WITHOUT_SOURCE = """
import fastgpt

assert fastgpt.__file__.endswith(".pyc")
assert fastgpt.explain(fastgpt.load_demo()[0]).startswith("the engine")
"""


def test_bug_without_source_files_every_function_counted_as_replaced(tmp_path: Path) -> None:
    """As in programs that are packed into one file: the code names files that are not there."""
    for package in (fastgpt, fastgpt_kernels):
        source = Path(package.__path__[0])
        copy = shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(copy, legacy=True, quiet=1, stripdir=tmp_path)
        for file in copy.rglob("*.py"):
            file.unlink()
    path = os.pathsep.join([str(tmp_path), *(folder for folder in sys.path if Path(folder, "torch").is_dir())])
    run_in_a_new_process(LOADS_WITHOUT_SOURCE, path)
