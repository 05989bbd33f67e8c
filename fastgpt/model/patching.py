"""Patching: a GPT-2 runs on fastgpt when its modules have fastgpt's classes.

The classes add no state to transformers' own, so assigning `__class__` is the whole change. Parameters, hooks, adapters
and settings stay.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .checks import check_module
from .plain import watch

# The name under which our attention is registered with transformers: config._attn_implementation.
ATTENTION = "fastgpt"

Module = TypeVar("Module", bound=nn.Module)
Class = TypeVar("Class", bound=type[nn.Module])
Replacements = dict[type[nn.Module], type[nn.Module]]

_TO_FASTGPT: Replacements = {}
# Classes that other models also use are swapped only as attributes of a GPT-2 module: name -> (theirs, ours).
_PARTS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {}


def replaces(theirs: type[nn.Module], parts: tuple[str, ...] = ()) -> Callable[[Class], Class]:
    """Declare a class as the replacement of transformers' or torch's; with `parts`, only under those names."""

    def register(ours: Class) -> Class:
        watch(theirs)
        watch(ours)
        if parts:
            _PARTS.update(dict.fromkeys(parts, (theirs, ours)))
        else:
            _TO_FASTGPT[theirs] = ours
        if issubclass(ours, PreTrainedModel):
            # transformers looks up what to record (hidden states, attentions) by the name of the model's class.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(ours), ours._can_record_outputs)
        return ours

    return register


class _Signature(inspect.Signature):
    """The signature of a class's current forward, from which transformers and its Trainer choose the inputs."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.kind = kind

    @property
    def parameters(self):
        return _signature_of(self.kind.forward).parameters

    def replace(self, **changes) -> inspect.Signature:  # type: ignore[override] - a fixed one
        return _signature_of(self.kind.forward).replace(**changes)


_signature_of = lru_cache(maxsize=16)(inspect.signature)


def forward_of(theirs: type[nn.Module]) -> Callable[[Callable], Callable]:
    """Give a forward the name and docstring of that of `theirs`, and the signature that that one has at any time."""

    def change(ours: Callable) -> Callable:
        ours = wraps(theirs.forward)(ours)
        ours.__signature__ = _Signature(theirs)  # type: ignore[attr-defined]
        return ours

    return change


def named(theirs: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the forward of `theirs`, by name; `args` are those after the ids."""
    return dict(zip([*_signature_of(theirs.forward).parameters][2:], args, strict=False)) | kwargs if args else kwargs


def replacement(theirs: type[nn.Module]) -> type[Any] | None:
    """fastgpt's class for one of transformers'; None for one that a reload of transformers' file has made since."""
    return _TO_FASTGPT.get(theirs)


def swap_classes(model: nn.Module, *, to_fastgpt: bool) -> int:
    """Change the class of every GPT-2 module in `model` and of its parts, or of none if one fails.

    Returns how many modules changed.
    """
    with _all_or_nothing() as undo:
        return _swap_classes(model, undo, to_fastgpt=to_fastgpt)


def _swap_classes(model: nn.Module, undo: "Undo", *, to_fastgpt: bool) -> int:
    table = _TO_FASTGPT if to_fastgpt else {ours: theirs for theirs, ours in _TO_FASTGPT.items()}
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in model.modules():
        if type(module) not in _TO_FASTGPT and type(module) not in _TO_FASTGPT.values():
            continue
        swaps += [(module, table[type(module)])] if type(module) in table else []
        for name, (theirs, ours) in _PARTS.items():
            before, after = (theirs, ours) if to_fastgpt else (ours, theirs)
            part = module._modules.get(name)
            swaps += [(part, after)] if part is not None and type(part) is before else []

    for module, new_class in swaps:
        forward = type(module).forward
        _set(module, "__class__", new_class, undo)
        # Wrappers, such as accelerate's for models on several devices, keep the method that they wrap on the module.
        for name, value in [*vars(module).items()]:
            if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is forward:
                _set(module, name, MethodType(new_class.forward, module), undo)
    return len(swaps)


Undo = list[tuple[object, str, object]]


def _set(target: Any, name: str, value: Any, undo: Undo) -> None:
    undo.append((target, name, getattr(target, name)))
    setattr(target, name, value)


@contextmanager
def _all_or_nothing() -> Iterator[Undo]:
    """Collect the old value of every change, and restore them all if the block raises."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        for target, name, value in reversed(undo):
            if getattr(target, name) is not value:
                setattr(target, name, value)
        raise


def patch(model: Module) -> Module:
    """Make a transformers GPT-2, or a model that contains one, run on fastgpt; in place.

    Weights, hooks, adapters and settings stay. transformers' default attention ("sdpa") is replaced by ours; another
    choice ("eager", "flex_attention", ...) is kept. `unpatch` undoes it.
    Returns the model, unchanged if it already runs on fastgpt. Raises ValueError when it contains no GPT-2, TypeError
    when it is no torch module. On any error the model is unchanged.
    """
    check_module(model, "patch")
    runs_already = any(type(module) in _TO_FASTGPT.values() for module in model.modules())
    with _all_or_nothing() as undo:
        n_changed = _swap_classes(model, undo, to_fastgpt=True)
        if n_changed:
            _change_attention(model, "sdpa", ATTENTION, undo)
    if not n_changed and not runs_already:
        raise ValueError(f"no transformers GPT-2 module in {type(model).__name__}: nothing to patch")
    return model


def unpatch(model: Module) -> Module:
    """Restore the classes of transformers and its default attention in a model that runs on fastgpt; in place.

    Returns the model. Raises ValueError, and leaves the model unchanged, when nothing in it runs on fastgpt, and
    TypeError when it is no torch module.
    """
    check_module(model, "unpatch")
    with _all_or_nothing() as undo:
        if not _swap_classes(model, undo, to_fastgpt=False):
            raise ValueError(f"nothing in {type(model).__name__} runs on fastgpt: nothing to unpatch")
        _change_attention(model, ATTENTION, "sdpa", undo)
    return model


def _change_attention(model: nn.Module, before: str, after: str, undo: Undo) -> None:
    for module in model.modules():
        if isinstance(module, hf.GPT2PreTrainedModel | hf.GPT2Attention):
            config = module.config
            if config._attn_implementation == before:
                _set(config, "_attn_implementation", after, undo)
