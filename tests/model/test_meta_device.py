"""Without values, as estimators of memory and FLOPs run models, shapes and dtypes are transformers'."""

from typing import Any

import pytest
import torch
import transformers
from models import tiny_config
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastgpt

CLASSES = {
    "GPT2Model": {},
    "GPT2LMHeadModel": {"labels": (1, 9)},
    "GPT2DoubleHeadsModel": {"labels": (1, 9)},
    "GPT2ForSequenceClassification": {},
    "GPT2ForTokenClassification": {"labels": (1, 9)},
    "GPT2ForQuestionAnswering": {"start_positions": (1,), "end_positions": (1,)},
}


def shapes(outputs: Any) -> Any:
    """The shapes and dtypes of all tensors in the outputs of a model."""
    if isinstance(outputs, Tensor):
        return outputs.shape, outputs.dtype, outputs.device.type
    if isinstance(outputs, dict):
        return {name: shapes(value) for name, value in outputs.items()}
    return [shapes(value) for value in outputs] if isinstance(outputs, tuple) else type(outputs).__name__


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("recomputes_norms", [True, False])
def test_shapes_and_gradients(name: str, is_training: bool, recomputes_norms: bool) -> None:
    found = []
    for classes in (transformers, fastgpt):
        with torch.device("meta"):
            model = getattr(classes, name)(tiny_config(pad_token_id=None, num_labels=3)).train(is_training)
            ids = torch.ones(1, 9, dtype=torch.int64)
            more = {key: torch.zeros(shape, dtype=torch.int64) for key, shape in CLASSES[name].items()}
        model.config.recompute_norms = recomputes_norms
        # With a cache, as by default: without one transformers asks whether sequences are packed, which needs values.
        outputs = model(ids, **more, output_hidden_states=True)
        (outputs.loss if more else outputs[0]).sum().backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found.append((shapes(dict(outputs)), shapes(gradients)))
    assert found[0] == found[1]
    assert found[0][1]


@pytest.mark.parametrize("is_training", [True, False])
def test_bug_a_mask_without_values_was_read(is_training: bool) -> None:
    found = []
    with FakeTensorMode():
        for classes in (transformers, fastgpt):
            model = classes.GPT2LMHeadModel(tiny_config()).train(is_training)
            ids = torch.ones(2, 9, dtype=torch.int64)
            found.append(shapes(model(ids, attention_mask=torch.ones_like(ids)).logits))
    assert found[0] == found[1]
