"""What the engine cannot run goes to transformers' loop, and the log says why."""

from typing import Any

import peft
import pytest
import torch
import transformers
from models import pair, tiny_config, token_ids
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

import fastgpt
from fastgpt.generate import routing
from fastgpt.model.compat import CACHE

GREEDY = {"do_sample": False, "eos_token_id": None}
THE_ENGINE = "generate: the engine"
LETTERS = ByteLevel.alphabet()
TOKENIZER = transformers.GPT2Tokenizer(vocab={letter: i for i, letter in enumerate(sorted(LETTERS))}, merges=[])


class _Custom(transformers.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"do_sample": True, "top_k": 3, "min_p": 0.1}, None),
        ({"logits_processor": LogitsProcessorList([_Custom()])}, "logits processor _Custom"),
        ({"no_repeat_ngram_size": 2}, "logits processor NoRepeatNGram"),
        ({"stopping_criteria": StoppingCriteriaList([lambda ids, _: ids[:, -1] == 3])}, "stopping criterion function"),
        ({"stop_strings": ["end"], "tokenizer": TOKENIZER}, "stopping criterion StopStringCriteria"),
        ({"max_time": 60.0}, "stopping criterion MaxTimeCriteria"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores was asked for"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states was given"),
        ({"use_cache": False}, "cache is off"),
        ({"cache_implementation": "static"}, "cache is StaticCache"),
        ({CACHE: DynamicCache()}, "a cache was given"),
        ({"token_type_ids": torch.ones(2, 8, dtype=torch.long)}, "token_type_ids was given"),
        ({"attention_mask": torch.tensor([[1] * 7 + [0], [1] * 8])}, "hides more than padding on the left"),
        ({"attention_mask": torch.tensor([[0, 1, 0] + [1] * 5, [1] * 8])}, "hides more than padding on the left"),
        ({"pad_token_id": 131, "eos_token_id": 130}, "pad_token_id 131 is outside"),
        ({"pad_token_id": 131, "eos_token_id": 131}, None),
        ({"tokenizer": TOKENIZER}, None),
        ({"num_beams": 2}, "beam search was asked for"),
        ({"prompt_lookup_num_tokens": 3}, None),
        ({"synced_gpus": True}, "synced_gpus was given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_calls_go_where_they_can_be_served(options: dict, reason: str | None, route, monkeypatch) -> None:
    _, ours = pair(tiny_config())
    if "synced_gpus" in options:
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    torch.manual_seed(0)
    n_rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ours.generate(token_ids(n_rows, 8, 131), max_new_tokens=4, **{"do_sample": False} | options)
    (message,) = route()
    assert (message == THE_ENGINE) if reason is None else (reason in message), message


def _with_lora(model: Any) -> None:
    lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(lora, model)


def _with_hook(model: Any) -> None:
    model.transformer.h[1].mlp.register_forward_hook(lambda module, inputs, output: output.flip(-1))


def _with_linear(model: Any) -> None:
    product = model.transformer.h[0].mlp.c_proj
    linear = nn.Linear(*product.weight.shape)
    linear.weight.data, linear.bias.data = -product.weight.data.t().contiguous(), product.bias.data
    model.transformer.h[0].mlp.c_proj = linear


def _with_own_forward(model: Any) -> None:
    forward = model.transformer.forward

    def louder(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output

    model.transformer.forward = louder


@pytest.mark.parametrize("change", [_with_lora, _with_hook, _with_linear, _with_own_forward])
def test_changed_models_go_to_transformers_and_the_change_acts(change, route) -> None:
    theirs, ours = pair(tiny_config())
    ids, options = token_ids(2, 8, 131), {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    before = ours.generate(ids, **options)
    assert route() == [THE_ENGINE]
    change(theirs)
    change(ours)
    after = ours.generate(ids, **options)
    (message,) = route()
    assert "is not a plain module" in message
    assert after.tolist() == theirs.generate(ids, **options).tolist() != before.tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "in training mode"),
        (lambda model: model.set_attn_implementation("eager"), "the attention is 'eager'"),
        (lambda model: model.lm_head.bfloat16(), "differ in device or dtype"),
    ],
)
@torch.no_grad()
def test_states_of_a_model_that_the_engine_leaves_alone(change, reason: str) -> None:
    _, ours = pair(tiny_config(tie_word_embeddings=False))
    assert routing.why_not_model(ours) is None
    change(ours)
    assert reason in str(routing.why_not_model(ours))


@torch.no_grad()
def test_surroundings_that_the_engine_leaves_alone() -> None:
    _, ours = pair(tiny_config())
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(routing.why_not_model(ours))
    with torch.enable_grad():
        assert "gradients" in str(routing.why_not_model(ours))
    assert routing.describe(ours) == "the engine: static cache, torch operations"


def test_patched_model_takes_the_engine_and_an_unpatched_one_does_not(route) -> None:
    model, _ = pair(tiny_config())
    ids, options = token_ids(2, 8, 131), {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options).tolist()
    assert route() == []
    assert fastgpt.patch(model).generate(ids, **options).tolist() == expected
    assert route() == [THE_ENGINE]


def test_changed_weights_are_seen() -> None:
    theirs, ours = pair(tiny_config())
    ids, options = token_ids(2, 8, 131), {"max_new_tokens": 12, "do_sample": False}
    before = ours.generate(ids, **options).tolist()
    for model in (theirs, ours):
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.neg_()
        model.transformer.h[1].attn.c_proj.weight = nn.Parameter(-model.transformer.h[1].attn.c_proj.weight)
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist() != before
