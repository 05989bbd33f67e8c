"""Quantisers of others exchange the weights or modules of products: before `patch`, after it, and in our class.

They know nn.Linear alone, so that all but the head of GPT-2 is out of their reach until its Conv1D are linear layers.
"""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastgpt


def torchao(model: nn.Module) -> None:
    quantization: Any = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quanto(model: nn.Module) -> None:
    quanto: Any = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)


def hqq(model: nn.Module) -> None:
    quantize: Any = importlib.import_module("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            rounded = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            model.set_submodule(name, rounded)


QUANTISERS = {"torchao": torchao, "optimum.quanto": quanto, "hqq": hqq}


def with_linear_layers(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.load_state_dict({"weight": module.weight.t(), "bias": module.bias})
            model.set_submodule(name, linear)


def answers(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of rows without padding, and greedy tokens after rows with padding."""
    ids = token_ids(2, 9, 131)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        logits = model.eval()(ids).logits
    return logits, model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("blocks", [False, True], ids=["head", "blocks too"])
@pytest.mark.parametrize("name", QUANTISERS)
def test_quantised_model(name: str, blocks: bool) -> None:
    pytest.importorskip(name)
    theirs, ours = pair(tiny_config(n_embd=64, n_head=2, tie_word_embeddings=False))
    without = answers(theirs)[0]

    def quantised(model: Any) -> Any:
        if blocks:
            with_linear_layers(model)
        QUANTISERS[name](model)
        return model

    tries: dict[str, Callable[[], Any]] = {
        "fastgpt's class": lambda: quantised(ours),
        "patched before": lambda: quantised(fastgpt.patch(copy.deepcopy(theirs))),
        "patched after": lambda: fastgpt.patch(quantised(copy.deepcopy(theirs))),
    }
    found = {way: answers(make()) for way, make in tries.items()}
    logits, tokens = answers(quantised(theirs))
    assert (logits - without).abs().max() > 1e-3, "nothing was quantised"
    for way, (our_logits, our_tokens) in found.items():
        assert_same_within_rounding(our_logits, logits, n_ulps=1024)
        assert our_tokens.tolist() == tokens.tolist(), way
