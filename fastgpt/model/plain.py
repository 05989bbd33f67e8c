"""Which modules are plain: unchanged since their constructor, and of a class that is unchanged since import.

Fused code reads the weights of modules that transformers would call. The results agree only if calling the module runs
its class's code and nothing else, so everything that a call depends on is compared with a newly made example. A module
that differs in any way is called instead of read.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from types import FunctionType, MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

# The attributes of a class that decide what `module(...)` runs.
CALLED = "__call__", "_wrapped_call_impl", "_call_impl", "forward", "__getattr__", "__getattribute__"
_called = attrgetter(*CALLED)
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
hooks = attrgetter(*HOOKS)
# transformers marks modules whose weights it has initialised; no forward reads the mark.
MARKS = {"_is_hf_initialized"}
# The packages whose functions belong in these classes. A function from elsewhere was put into a class.
_HOMES = {"torch", "transformers", "fastgpt", *sys.stdlib_module_names}

# --- classes --------------------------------------------------------------------------------------------------------


def _is_from_elsewhere(value: Any) -> bool:
    """Whether a function, property or method of a class was defined outside of torch, transformers and fastgpt."""
    parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
    return any(module.partition(".")[0] not in _HOMES for part in parts for module in _modules_of(part))


def _modules_of(value: Any) -> Iterator[str]:
    """The modules with the code of a function and of the functions that it wraps.

    Not what `__module__` says, which a wrapper copies from what it wraps. Nor the file, which code that was typed into
    Python or came without its source does not have.
    """
    while value is not None and (callable(value) or hasattr(value, "__get__")):
        value = getattr(value, "__func__", value)  # of a classmethod or a staticmethod
        # Not isinstance, because an object that stands for a function says that it is one.
        yield value.__globals__.get("__name__", "") if type(value) is FunctionType else type(value).__module__
        value = getattr(value, "__wrapped__", getattr(value, "func", None))


@dataclass(frozen=True)
class _Seen:
    """A class at import: its attributes, and the names of functions that others had already put into it."""

    attributes: dict[str, Any]
    foreign: tuple[str, ...]


_seen: dict[type, _Seen] = {}
_called_at_import: dict[type, tuple[Any, ...]] = {}
_forward_at_import: dict[type, Any] = {}
_UNKNOWN = (None,)  # no function is this one


def watch(kind: type[nn.Module]) -> None:
    """Record a class and its bases as they are now."""
    for base in kind.__mro__:
        if base not in _seen and base is not object:
            attributes = dict(vars(base))
            foreign = tuple(name for name, value in attributes.items() if _is_from_elsewhere(value))
            _seen[base] = _Seen(attributes, foreign)
    is_foreign = any(name in CALLED for base in kind.__mro__[:-1] for name in _seen[base].foreign)
    _called_at_import[kind] = _UNKNOWN if is_foreign else _called(kind)
    _forward_at_import[kind] = None if is_foreign else kind.forward


def is_as_imported(kind: type[nn.Module]) -> bool:
    """Whether calling a module of this class runs the functions that it ran when fastgpt was imported.

    A class that a reload of transformers' file has made since is not known, and is not as imported.
    """
    if torch.compiler.is_compiling():
        return kind.forward is _forward_at_import.get(kind)  # Dynamo can follow this, and traces the rest itself
    # Not `==`: a wrapper, such as wrapt's, says that it is equal to the function that it wraps.
    return all(map(is_, _called(kind), _called_at_import.get(kind, _UNKNOWN)))


def _have_same_values(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether classes' attributes have the same names and are the same objects, in one order; not `==`, as above."""
    return [*one] == [*other] and all(map(is_, one.values(), other.values()))


def changes_of_class(kind: type) -> Iterator[str]:
    """Functions of a class or its bases that were replaced since import, or that others had replaced before."""
    for base in kind.__mro__[:-1]:
        seen, now = _seen[base], vars(base)
        if _have_same_values(now, seen.attributes) and not seen.foreign:
            continue
        for name in (*seen.foreign, *sorted(now.keys() | seen.attributes.keys())):
            before, after = seen.attributes.get(name), now.get(name)
            is_code = any(callable(value) or hasattr(value, "__get__") for value in (before, after))
            is_new = not any(name in _seen[other].attributes for other in kind.__mro__[:-1]) and not hasattr(
                object, name
            )
            if name in seen.foreign or (is_code and before is not after and not is_new and name not in _NOT_CODE):
                yield f"{base.__name__}.{name} was replaced"


# These do not affect a call. The first torch.compile of a process wraps the two functions that make modules, but
# the modules themselves are compared. Python adds the other attributes on first access.
_MAKING = {"__init__", "__setstate__"}
_NOT_CODE = {*_MAKING, "__annotations__", "__annotate__", "__annotate_func__", "__doc__", "__abstractmethods__"}

# --- modules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """What makes a module plain. fixed: its attributes except sizes. parameters: their names."""

    read_fixed: Callable[[Any], Any]
    fixed: Any
    parameters: list[str]
    shapes: Callable[[Any], tuple[tuple[int, ...] | None, ...]]


_kinds: dict[type[nn.Module], _Kind] = {}
_hides_nothing = frozenset(CALLED).isdisjoint


def declare(example: nn.Module, sizes: Sequence[str] = (), shapes: Callable[[Any], tuple] = lambda _: ()) -> None:
    """Declare that modules of this example's class are plain if they differ from it only in sizes.

    sizes: attributes that a user chooses. shapes: given a module, the shapes of its parameters in order; None for a
    bias that must be absent.
    """
    watch(type(example))
    fixed = sorted(vars(example).keys() - vars(nn.Module()).keys() - set(sizes))
    read_fixed = attrgetter(*fixed) if fixed else type
    fixed_values = read_fixed(example)
    _kinds[type(example)] = _Kind(read_fixed, fixed_values, list(example._parameters), shapes)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly of class `kind`, unchanged since its constructor, and nothing surrounds its call.

    LoRA and quantisation replace the class, hooks and device dispatch surround the call, FSDP2 and tensor parallelism
    replace the parameters, and users replace anything. All of these need the module's own call.
    """
    if torch.compiler.is_compiling():
        return _is_plain_to_dynamo(module, kind)
    if type(module) is not kind or any(hooks(module)) or _has_any_global_hook():
        return False
    # The code of its class reads no other name that a module may hold.
    if not _hides_nothing(module.__dict__) or not all(map(is_, _called(kind), _called_at_import[kind])):
        return False
    rule, parameters = _kinds[kind], module._parameters
    fixed = rule.read_fixed(module)
    if fixed != rule.fixed and not same(fixed, rule.fixed):
        return False
    if not parameters and not rule.parameters:
        return True
    if list(parameters) == rule.parameters:
        held = parameters.values()
    elif parameters.keys() <= set(rule.parameters):
        # FSDP1 sets gathered tensors as attributes of the module, or restores the parameters in another order.
        held = [getattr(module, name, None) for name in rule.parameters]
    else:
        return False
    return all(map(_fits, held, rule.shapes(module)))


_TENSORS = nn.Parameter, Tensor, FakeTensor, NoneType  # a fake one stands for a tensor of torch


def _fits(parameter: Tensor | None, shape: tuple[int, ...] | None) -> bool:
    return parameter is shape if parameter is None else type(parameter) in _TENSORS and parameter.shape == shape


def is_parameter(tensor: Tensor) -> bool:
    """Whether its type is torch's own. A subclass may compute differently or lie on several devices."""
    return type(tensor) in _TENSORS


def _is_plain_to_dynamo(module: nn.Module, kind: type[nn.Module]) -> bool:
    """The part of the rule that Dynamo can follow: it guards what it reads, and recompiles when that changes."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not _has_any_global_hook()
        and all(type(parameter) in _TENSORS for parameter in module._parameters.values())
    )


def same(value: Any, other: Any) -> bool:
    """Equal, or partial applications of the same function to the same arguments."""
    if isinstance(value, partial) and isinstance(other, partial):
        return (value.func, value.args, value.keywords) == (other.func, other.args, other.keywords)
    return type(value) is type(other) and (value is other or bool(value == other))


def fused_activation(act: nn.Module) -> str | None:
    """The name under which `gelu_mlp` knows this activation module."""
    name = _ACTIVATIONS.get(type(act))
    is_python_twin = isinstance(getattr(act, "act", None), MethodType)  # gelu_python: unfused at the user's request
    return None if name is None or is_python_twin or not is_plain(act, type(act)) else name


_ACTIVATIONS: dict[type[nn.Module], str] = {
    NewGELUActivation: "gelu_new",
    GELUTanh: "gelu_new",
    GELUActivation: "gelu",
    FastGELUActivation: "gelu_fast",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}
for _activation in _ACTIVATIONS:
    declare(_activation())

declare(Conv1D(1, 1), ("nf", "nx"), lambda it: ((it.nx, it.nf), (it.nf,)))
declare(
    nn.Linear(1, 1, bias=False),
    ("in_features", "out_features"),
    lambda it: ((it.out_features, it.in_features), None),
)
declare(nn.Dropout(), ("p",))
watch(nn.ModuleList)
