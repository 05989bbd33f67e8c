"""The bundled model in both libraries, for clients that need a tokenizer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from models import NO_DROPOUT

import fastgpt


@pytest.fixture(scope="session")
def demo_pair() -> Callable[[], tuple[Any, Any, Any]]:
    """Makes (transformers' model, fastgpt's model, tokenizer) of the bundled weights, without dropout."""
    bundled, tokenizer = fastgpt.load_demo()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = copy.deepcopy(bundled.config)
    for name, probability in NO_DROPOUT.items():
        setattr(config, name, probability)

    def make() -> tuple[Any, Any, Any]:
        theirs = transformers.GPT2LMHeadModel._from_config(copy.deepcopy(config))
        ours = fastgpt.GPT2LMHeadModel(copy.deepcopy(config))
        for model in (theirs, ours):
            model.load_state_dict(bundled.state_dict())
            model.eval()
        return theirs, ours, tokenizer

    return make
