"""What transformers' generate() calls on a model belongs to the rule, and soft prompts take part."""

import sys
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from models import lively, tiny_config, token_ids
from transformers import GPT2LMHeadModel, TextStreamer

import fastgpt
from fastgpt import plain

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


@pytest.mark.parametrize("mode", MODES)
def test_every_function_called_on_the_model_is_watched(mode: str) -> None:
    """Of each class that plays a part, the rule remembers every function: none that is called is missing there."""
    model, options = stock(), dict(MODES[mode])
    if options.get("assistant_model"):
        options["assistant_model"] = stock()
    if options.get("streamer"):

        class Silent(TextStreamer):
            def __init__(self) -> None: ...
            def put(self, value: Any) -> None: ...
            def end(self) -> None: ...

        options["streamer"] = Silent()
    modules = {id(module): module for module in model.modules()}
    called: dict[CodeType, Any] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_argcount and code not in called:
            first = frame.f_locals.get(code.co_varnames[0])
            if id(first) in modules and code.co_varnames[0] == "self":
                called[code] = type(first)

    sys.setprofile(note)
    try:
        model.generate(token_ids(1, 7, 131), **GREEDY | options)
    finally:
        sys.setprofile(None)
    assert len(called) > 20
    for code, kind in called.items():
        watched = [plain._seen[base].attributes for base in kind.__mro__[:-1] if base in plain._seen]
        known = {found for attributes in watched for value in attributes.values() for found in codes_of(value)}
        assert code in known, f"{kind.__name__}: {code.co_qualname} in {code.co_filename}"


@pytest.mark.parametrize("method", ["PromptTuning", "PromptEncoder", "PrefixTuning"])
def test_soft_prompts_take_part(method: str) -> None:
    import peft

    found = []
    for is_ours in (False, True):
        model = stock()
        if is_ours:
            fastgpt.patch(model)
            model.generate(token_ids(2, 7, 131), **GREEDY)
        torch.manual_seed(0)
        config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
        adapted = peft.get_peft_model(model, config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.prompt_encoder.parameters():
                parameter.normal_()
        found.append(adapted.generate(input_ids=token_ids(2, 7, 131), **GREEDY).tolist())
    assert found[0] == found[1]
    assert found[0] != stock().generate(token_ids(2, 7, 131), **GREEDY).tolist()
