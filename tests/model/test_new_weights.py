"""New weights, of a whole model or of the parts that a checkpoint lacks: from the same seed they are transformers'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import HEADS, tiny_config

import fastgpt


def _initialised_again(kind: Any, _: Path) -> Any:
    model = kind(tiny_config())
    for module in [*model.modules(), *model.parameters()]:
        module._is_hf_initialized = False
    model.init_weights()
    return model


MAKERS: dict[str, Callable[[Any, Path], Any]] = {
    "constructor": lambda kind, _: kind(tiny_config()),
    "_from_config": lambda kind, _: kind._from_config(tiny_config()),
    "empty state_dict": lambda kind, _: kind.from_pretrained(None, config=tiny_config(), state_dict={}),
    "new cross-attention": lambda kind, saved: kind.from_pretrained(saved, add_cross_attention=True),
    "other shapes": lambda kind, saved: kind.from_pretrained(saved, n_inner=100, ignore_mismatched_sizes=True),
    "init_weights": _initialised_again,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    transformers.GPT2LMHeadModel(tiny_config()).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("head", HEADS)
def test_bug_residual_projections_were_not_scaled_down(head: str, maker: str, saved: Path) -> None:
    weights = []
    for library in (transformers, fastgpt):
        torch.manual_seed(0)
        weights.append(MAKERS[maker](getattr(library, head), saved).state_dict())
    theirs, ours = weights
    assert list(ours) == list(theirs)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_weights_of_a_patched_model_initialised_again() -> None:
    models = transformers.GPT2Model(tiny_config()), fastgpt.patch(transformers.GPT2Model(tiny_config()))
    weights = []
    for model in models:
        torch.manual_seed(0)
        weights.append(_initialised_again(lambda _, model=model: model, Path()).state_dict())
    theirs, ours = weights
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_users_subclass_is_custom_code_as_it_is_of_transformers() -> None:
    for library in (transformers, fastgpt):
        assert type("Mine", (library.GPT2Model,), {"__module__": "mine"}).is_custom_code()
