"""Devices without float64, such as Apple's GPUs: nothing on the model's own device makes a tensor of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels.common.int8 import Int8Matrix
from models import pair, tiny_config, token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgpt
from fastgpt.evaluation import mean_loss


@pytest.fixture(autouse=True)
def _in_torch():
    with fastgpt.backend("torch"):
        yield


class RefusesFloat64(TorchDispatchMode):
    """Raises TypeError, as such a device does, where an operation returns a tensor in float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            raise TypeError(f"{func} made a tensor in float64")
        return result


def generated(**options: Any) -> Callable[[Any], Any]:
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, **options}
    n_rows = 1 if "prompt_lookup_num_tokens" in options else 2
    return lambda model: model.generate(token_ids(n_rows, 8, 131), **options)


def trained(model: Any) -> None:
    ids = token_ids(2, 9, 131)
    output = model.train()(ids, attention_mask=(ids > 20).long().sort().values, labels=ids)
    output.loss.backward()
    output.logits.sum()


def trained_with_more_terms(model: Any) -> None:
    model.loss_function = fastgpt.CausalLMLoss(label_smoothing=0.1, z_loss=1e-3)
    model.config.recompute_norms = True
    trained(model)


USES = {
    "forward": lambda model: model(token_ids(2, 9, 131), output_hidden_states=True),
    "greedy": generated(do_sample=False),
    "sampled": generated(do_sample=True),
    "with a seed": generated(do_sample=True, seed=3, top_k=20, top_p=0.9, temperature=0.7, repetition_penalty=1.2),
    "beams": generated(num_beams=3),
    "prompt lookup": generated(prompt_lookup_num_tokens=3),
    "training": trained,
    "training with more terms": trained_with_more_terms,
}


@pytest.mark.parametrize("use", USES)
def test_a_model_in_float32_needs_no_float64(use: str) -> None:
    _, model = pair(tiny_config())
    with RefusesFloat64():
        USES[use](model)


class OnApple(Tensor):
    """A tensor on such a device: it has no float64, and `cpu()` gives an ordinary tensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.double or (kwargs or {}).get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        result: Any = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if func is Tensor.cpu else result


def test_int8_values_are_those_of_another_device() -> None:
    matrix: Any = torch.randn(24, 40)
    there, here = Int8Matrix.nearest(matrix.as_subclass(OnApple)), Int8Matrix.nearest(matrix)
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def test_the_losses_of_a_text_are_added_on_the_cpu(monkeypatch) -> None:
    _, model = pair(tiny_config())
    ids = token_ids(1, 40, 131)[0]
    expected = mean_loss(model, ids)
    loss: Any = fastgpt.ops.linear_cross_entropy
    there = lambda *arguments, **options: loss(*arguments, **options).as_subclass(OnApple)  # noqa: E731
    monkeypatch.setattr(fastgpt.ops, "linear_cross_entropy", there)
    assert mean_loss(model, ids) == expected
