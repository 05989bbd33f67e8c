"""What transformers' generate() calls on a model belongs to the rule, and soft prompts take part."""

import sys
from functools import wraps
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from models import lively, tiny_config, token_ids
from transformers import GPT2LMHeadModel, TextStreamer

import fastgpt
from fastgpt.generate import routing
from fastgpt.model import plain

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    "beams": {"num_beams": 2},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "return dict": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "streamer": {"streamer": True},
    "assisted": {"assistant_model": True},
}


def stock() -> Any:
    torch.manual_seed(0)
    return lively(GPT2LMHeadModel(tiny_config())).eval()


def codes_of(function: Any) -> set[CodeType]:
    """The code of a function of a class and of the functions that it decorates."""
    found: set[CodeType] = set()
    for part in (function, *(getattr(function, name, None) for name in ("fget", "fset", "__func__"))):
        while part is not None:
            if isinstance(code := getattr(part, "__code__", None), CodeType):
                found.add(code)
            part = getattr(part, "__wrapped__", None)
    return found


def called_on(model: Any, options: dict[str, Any]) -> dict[CodeType, Any]:
    """The functions that generate() calls on a model and its modules, each with the module it is first called on."""
    modules = {id(module) for module in model.modules()}
    called: dict[CodeType, Any] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_argcount and code.co_varnames[0] == "self" and code not in called:
            first = frame.f_locals.get("self")
            if id(first) in modules:
                called[code] = first

    sys.setprofile(note)
    try:
        model.generate(token_ids(1, 7, 131), **GREEDY | options)
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("mode", MODES)
def test_every_function_called_on_the_model_is_watched(mode: str) -> None:
    """The rule remembers every function of each class that plays a part: none that is called is missing there."""
    model, options = stock(), dict(MODES[mode])
    if options.get("assistant_model"):
        options["assistant_model"] = stock()
    if options.get("streamer"):

        class Silent(TextStreamer):
            def __init__(self) -> None: ...
            def put(self, value: Any) -> None: ...
            def end(self) -> None: ...

        options["streamer"] = Silent()
    called = called_on(model, options)
    assert len(called) > 20
    for code, module in called.items():
        kind = type(module)
        watched = [plain._seen[base].attributes for base in kind.__mro__[:-1] if base in plain._seen]
        known = {found for attributes in watched for value in attributes.values() for found in codes_of(value)}
        assert code in known, f"{kind.__name__}: {code.co_qualname} in {code.co_filename}"


def counted(function: Any, calls: list[None]) -> Any:
    """A function, property or method of a class that does what it did, and leaves a trace."""
    if isinstance(function, property):
        return property(counted(function.fget, calls), function.fset, function.fdel)
    if isinstance(function, staticmethod | classmethod):
        return type(function)(counted(function.__func__, calls))

    @wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    return noted


@pytest.mark.parametrize("place", ["class", "instance"])
@pytest.mark.parametrize("mode", ["greedy", "prompt lookup"])
def test_every_function_called_on_the_model_may_be_replaced(mode: str, place: str) -> None:
    """What stands in its place, on a class or on a module, runs for every token; the engine comes back afterwards."""
    theirs, ours, names = stock(), fastgpt.patch(stock()), {}
    for code, module in called_on(theirs, MODES[mode]).items():
        owner = next((base for base in type(module).__mro__ if code.co_name in vars(base)), None)
        path = next(path for path, part in theirs.named_modules() if part is module)
        is_method = owner is not None and not isinstance(vars(owner)[code.co_name], property)
        if owner is not None and (place == "class" or (is_method and not code.co_name.startswith("__"))):
            names.setdefault((owner, code.co_name), path)
    n_replaced = 0
    for (owner, name), path in names.items():
        n_calls = []
        for model in (theirs, ours):
            calls: list[None] = []
            holder = owner if place == "class" else model.get_submodule(path)
            function = vars(owner)[name] if place == "class" else getattr(holder, name)
            with mock.patch.object(holder, name, counted(function, calls)):
                model.generate(token_ids(1, 7, 131), **GREEDY | MODES[mode])
            n_calls.append(len(calls))
        assert n_calls[1] >= n_calls[0], f"{owner.__name__}.{name}"
        n_replaced += n_calls[0] > 0  # some are looked up elsewhere: on the class, or by another name
        with torch.no_grad():
            assert routing.why_not_model(ours) is None, f"{owner.__name__}.{name}"
    assert n_replaced > 35


CPT = {"cpt_token_ids": [3, 5, 7, 9], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}


@pytest.mark.parametrize("method", ["PromptTuning", "PromptEncoder", "PrefixTuning", "CPT"])
def test_soft_prompts_take_part(method: str) -> None:
    found = []
    for is_ours in (False, True):
        model = stock()
        if is_ours:
            fastgpt.patch(model)
            model.generate(token_ids(2, 7, 131), **GREEDY)
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_virtual_tokens": 4} if method != "CPT" else CPT
        config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options)
        adapted = peft.get_peft_model(model, config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.prompt_encoder.parameters():
                parameter.normal_()
        found.append(adapted.generate(input_ids=token_ids(2, 7, 131), **GREEDY).tolist())
    assert found[0] == found[1]
    assert found[0] != stock().generate(token_ids(2, 7, 131), **GREEDY).tolist()
