"""Public functions given something else than a model: one line that names it, and says what to give where it can."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from models import pair, tiny_config
from torch import nn

import fastgpt

OF_MODELS: dict[str, Callable[[Any], Any]] = {
    "patch": fastgpt.patch,
    "unpatch": fastgpt.unpatch,
    "release": fastgpt.release,
    "explain": fastgpt.explain,
    "warmup": fastgpt.warmup,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return pair(tiny_config())[1]


@pytest.fixture(scope="module")
def others(model: Any) -> dict[str, Any]:
    """What is given by mistake, and the words that the message ends with."""
    tokenizer = fastgpt.load_demo()[1]
    return {
        "not NoneType": None,
        "not str: load it first, as by fastgpt.GPT2LMHeadModel.from_pretrained": "gpt2",
        "not the class GPT2LMHeadModel": fastgpt.GPT2LMHeadModel,
        "not GPT2Config": model.config,
        "not list": [model],
        "not OrderedDict": model.state_dict(),
        f"not {type(tokenizer).__name__}": tokenizer,
        "not TextGenerationPipeline: give its .model": transformers.pipeline(
            "text-generation", model=model, tokenizer=tokenizer
        ),
    }


@pytest.mark.parametrize("name", OF_MODELS)
def test_what_is_no_model(name: str, others: dict[str, Any]) -> None:
    for words, other in others.items():
        with pytest.raises(TypeError) as caught:
            OF_MODELS[name](other)
        message = str(caught.value)
        assert message.startswith(f"fastgpt.{name} takes a model")
        assert message.endswith(words)


@pytest.mark.parametrize("name", ["explain", "warmup"])
def test_a_module_that_does_not_generate(name: str, model: Any) -> None:
    for other in (nn.Linear(2, 2), model.transformer):
        with pytest.raises(TypeError, match=rf"{name} takes a model with generate\(\), not {type(other).__name__}"):
            OF_MODELS[name](other)


def test_what_is_no_prompt(model: Any) -> None:
    tokenizer = fastgpt.load_demo()[1]
    for prompt, words in (
        ("ROMEO:", "not str"),
        (tokenizer("ROMEO:", return_tensors="pt"), r"not BatchEncoding: unpack it, generate\(\*\*inputs\)"),
    ):
        with pytest.raises(TypeError, match=rf"token ids.*, {words}"):
            model.generate(prompt)
    for prompt, words in (["ROMEO:"], "no token ids but 'ROMEO:'"), ([[1.5]], r"torch.float32, not token ids"):
        with pytest.raises(TypeError, match=f"prompt 0 holds {words}"):
            model.generate(prompt)


def test_what_describes_no_model() -> None:
    cases: list[tuple[Any, str]] = [(None, "NoneType"), (transformers.GPT2Config, "the class GPT2Config"), ([], "list")]
    for other, words in cases:
        with pytest.raises(TypeError, match=rf"expected a preset's name.*, not {words}"):
            fastgpt.count_parameters(other)
    with pytest.raises(TypeError, match="should be an instance of class"):
        fastgpt.GPT2LMHeadModel("gpt2")  # type: ignore[arg-type]
    for other in (None, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"expected a directory or a model id, not {type(other).__name__}"):
            fastgpt.GPT2LMHeadModel.from_pretrained(other)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (lambda _: fastgpt.CausalLMLoss(label_smoothing="0.1"), "label_smoothing must be .*, not '0.1'"),  # type: ignore[arg-type]
        (lambda _: fastgpt.CausalLMLoss(z_loss=None), "z_loss must be .*, not None"),  # type: ignore[arg-type]
        (lambda model: fastgpt.CausalLMLoss(reduction=model), "unknown reduction GPT2LMHeadModel"),
        (lambda model: fastgpt.backend(model).__enter__(), "unknown backend GPT2LMHeadModel"),
    ],
)
def test_a_setting_of_a_wrong_kind_is_shown_in_one_line(setting: Callable[[Any], Any], words: str, model: Any) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        setting(model)
    assert "\n" not in str(caught.value)


def test_warmup_at_one_batch_size(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(model, "generate", lambda ids, **_: shapes.append(tuple(ids.shape)))
    fastgpt.warmup(model, batch=2, prompt_tokens=3)
    assert shapes == [(2, 3)] * 2
