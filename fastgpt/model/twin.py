"""Whether a language model is exactly what its configuration describes, so that the engine may replace its forward.

The model is compared with a twin that is built from the same configuration without weights. A model found equal is
remembered, and later calls only check whether anything has changed since.
"""

import copy
import gc
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import is_, itemgetter, methodcaller
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as hf

from ..checkpoint.fit import rounding_of
from . import plain
from .patching import ATTENTION, replacement
from .rounded import RoundedLinear, replace_products


def difference(model: nn.Module) -> str | None:
    """How a model differs from a newly made GPT2LMHeadModel of fastgpt in eval mode; None if it does not."""
    proof = _proofs.get(model)
    if proof is not None and proof.holds(model):
        return None
    found = next(differences(model), None)
    # Tensors of one element have an `==` that is a truth value, so that a proof would take equal ones for the same.
    if found is None and all(parameter.numel() > 1 for parameter in model.parameters()):
        _proofs[model] = _Proof(model)
    return found


# --- comparison -----------------------------------------------------------------------------------------------------


def differences(model: nn.Module) -> Iterator[str]:
    """All differences of the model, one line each."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", ATTENTION)
    if attention != ATTENTION:
        yield f"the attention is {attention!r}"
    if type(model) is not replacement(hf.GPT2LMHeadModel):
        yield f"the model is not a plain module: {type(model).__name__}"
        return
    assert isinstance(model, hf.GPT2LMHeadModel)
    if not getattr(model.config, "is_causal", True):
        yield "its configuration says that attention is not causal"
    if _has_any_global_hook():
        yield "a hook is set on every module"
    try:
        twin = _twin_of(model)
    except Exception as error:  # the configuration was changed and describes no model any more
        yield f"its configuration describes no model: {error}"
        return
    parts, twins = (dict(it.named_modules(remove_duplicate=False)) for it in (model, twin))
    paths: dict[int, str] = {}
    for path, module in parts.items():
        if path not in twins:
            yield f"{path} is not in a GPT-2 of this configuration"
            return
        if id(module) in paths:
            yield f"{path} is the same module as {paths[id(module)]}"
        paths[id(module)] = path
        for what in _module_differences(module, twins[path], model.config, twin.config):
            yield f"{path or 'the model'} {what}"
    if list(parts) != list(twins):
        missing = [path for path in twins if path not in parts]
        yield f"{missing[0]} is missing" if missing else "its modules are in another order"
        return
    parameters = list(model.parameters())
    dtypes = {parameter.dtype for parameter in set(parameters) - _rounded_tensors(model)}
    if len(dtypes) != 1 or len({parameter.device for parameter in parameters}) != 1:
        yield "the parameters differ in device or dtype"
    for block in model.transformer.h:
        if plain.fused_activation(block.mlp.act) is None:  # type: ignore[union-attr]
            yield f"{type(block.mlp.act).__name__} is an activation that the engine does not know"  # type: ignore[union-attr]
    for kind in {type(module) for module in parts.values()}:
        yield from plain.changes_of_class(kind)


def _twin_of(model: hf.GPT2LMHeadModel) -> hf.GPT2LMHeadModel:
    """The twin, built again only after the configuration has changed: one that differs is compared in every call."""
    settings = dict(vars(model.config))
    held = _twins.get(model)
    if held is None or held[0] != settings:
        held = _twins[model] = settings, _twin(model)
    return held[1]


_twins: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], hf.GPT2LMHeadModel]] = WeakKeyDictionary()


def _twin(model: hf.GPT2LMHeadModel) -> hf.GPT2LMHeadModel:
    # Not under transformers' `no_init_weights`, which exchanges functions of torch in all threads.
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).eval()
    rounding = rounding_of(model.config)
    if rounding is not None:
        replace_products(twin, rounding)
    return twin


def converted(model: hf.GPT2LMHeadModel, dtype: torch.dtype) -> hf.GPT2LMHeadModel:
    """A copy in another dtype, for inference, of a model that does not differ from its twin.

    Tied weights stay tied, and rounded weights are those of the model itself.
    """
    twin = _twin(model)
    kept = _rounded_tensors(model)
    copies = {
        parameter: parameter if parameter in kept else nn.Parameter(parameter.to(dtype), requires_grad=False)
        for parameter in model.parameters()
    }
    for module, its_twin in zip(model.modules(), twin.modules(), strict=True):
        for name, parameter in module._parameters.items():
            its_twin._parameters[name] = None if parameter is None else copies[parameter]
    return twin


def _rounded_tensors(model: nn.Module) -> set[Tensor]:
    """The tensors that keep their dtypes whatever that of the model is."""
    return {tensor for module in model.modules() if isinstance(module, RoundedLinear) for tensor in module.matrix}


def _module_differences(
    module: nn.Module, twin: nn.Module, config: PreTrainedConfig, its_config: PreTrainedConfig
) -> Iterator[str]:
    if type(module) is not type(twin):
        yield f"is not a plain module: {type(module).__name__}"
        return
    if module.training:
        yield "is in training mode"
    if any(plain.hooks(module)):
        yield "is not a plain module: it has hooks"
    ours, theirs = vars(module), vars(twin)
    for name in (ours.keys() | theirs.keys()) - _NOT_COMPARED:
        if isinstance(module, PreTrainedModel):
            # Libraries leave notes on a model. Code reads such an attribute only if it hides one of the class.
            hidden = getattr(type(module), name, ours.get(name))
            is_different = name not in theirs and not plain.same(ours[name], hidden)
        elif isinstance(ours.get(name), PreTrainedConfig):
            is_different = ours[name] is not config or theirs.get(name) is not its_config
        else:
            is_different = name not in ours or name not in theirs or not plain.same(ours[name], theirs[name])
        if is_different:
            yield f"is not a plain module: its {name} was changed"
    if list(map(_described, module._parameters.items())) != list(map(_described, twin._parameters.items())):
        yield "is not a plain module: its parameters differ"
    elif isinstance(module, RoundedLinear) and [x.dtype for x in module.matrix] != [*module.parts.values()]:
        yield f"is not a plain module: its weight is not {module.matrix_type.kind} with a float32 scale"
    if module._buffers:
        yield "is not a plain module: it has buffers"


# Compared elsewhere, except the mark and the tags of model cards, which no forward reads.
_NOT_COMPARED = {"training", "_parameters", "_buffers", "_modules", "model_tags", *plain.HOOKS, *plain.MARKS}


def _described(item: tuple[str, Tensor | None]) -> tuple[Any, ...]:
    name, parameter = item
    return (name,) if parameter is None else (name, plain.is_parameter(parameter), parameter.shape)


# --- memory ---------------------------------------------------------------------------------------------------------


class _Proof:
    """A record of a model that was found equal to its twin, with every place where a later change would show.

    It holds no strong reference to a module or parameter, so that replaced ones are freed, and it is deleted with the
    first module that is freed. The comparisons are of whole lists and dictionaries, because a loop over 3,400
    attributes would take longer than a decode step. They look at identity first. What is not identical but equal, such
    as a copied table of hooks, is as good: a later change makes it unequal to the one that is held here.
    """

    def __init__(self, model: Any):
        model_ref = ref(model)

        def forget(_: Any) -> None:
            gone = model_ref()
            if gone is not None:
                _proofs.pop(gone, None)

        everything = list(model.modules())
        self.children = [module._modules for module in everything if module._modules]
        self.parameters = [module._parameters for module in everything if module._parameters]
        self.empty = [table for module in everything for table in (*plain.hooks(module), module._buffers)]
        self.classes = [vars(base) for base in {base for module in everything for base in type(module).__mro__[:-1]}]
        self.config = vars(model.config)

        body = _referents(*self.children)
        self.modules, self.namespaces = [ref(module, forget) for module in body], list(map(vars, [model, *body]))
        self.places, self.states = _referents(model, *body), list(map(dict, self.namespaces))
        self.names = list(chain.from_iterable(self.parameters))
        self.tensors = _Tensors(_referents(*self.parameters))
        self.attributes, self.functions = list(chain.from_iterable(self.classes)), list(_values_of(self.classes))
        self.settings = dict(self.config)

    def holds(self, model: nn.Module) -> bool:
        try:
            return (
                _referents(model, *_referents(*self.children)) == self.places
                and self.namespaces == self.states
                and not any(self.empty)
                and not _has_any_global_hook()
                and list(chain.from_iterable(self.parameters)) == self.names
                and self.tensors.hold(_referents(*self.parameters))
                and list(chain.from_iterable(self.classes)) == self.attributes
                and all(map(is_, _values_of(self.classes), self.functions))
                and self.config == self.settings
            )
        except (RuntimeError, ValueError):  # a tensor or array stands where none stood: its == is no truth value
            return False


def _values_of(tables: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(methodcaller("values"), tables))


class _Tensors:
    """A record of the types, shapes, dtypes and devices of parameters, and of which are None or tied to another.

    It compares by `TensorGuards`, with which torch checks the inputs of a compiled function: reading the same facts in
    Python takes four times as long. Their dispatch keys, which it also compares, are others in inference mode.
    """

    def __init__(self, parameters: list[Tensor | None]):
        first = {id(parameter): place for place, parameter in reversed(list(enumerate(parameters)))}
        self.absent = [place for place, parameter in enumerate(parameters) if parameter is None]
        self.tied = [
            (place, first[id(parameter)])
            for place, parameter in enumerate(parameters)
            if parameter is not None and first[id(parameter)] != place
        ]
        self.distinct = itemgetter(*sorted(set(first.values()) - set(self.absent)))
        self.guards: dict[bool, TensorGuards] = {}
        for is_inference in (False, True):
            with torch.inference_mode(is_inference):
                tensors = self.distinct(parameters)
                guard = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
                self.guards[is_inference] = guard

    def hold(self, parameters: list[Tensor | None]) -> bool:
        return (
            all(parameters[place] is None for place in self.absent)
            and all(parameters[place] is parameters[first] for place, first in self.tied)
            and self.guards[torch.is_inference_mode_enabled()].check(*self.distinct(parameters))
        )


# In one call: the values of dictionaries; of modules, their namespaces and classes.
_referents = gc.get_referents
_proofs: WeakKeyDictionary[nn.Module, _Proof] = WeakKeyDictionary()
