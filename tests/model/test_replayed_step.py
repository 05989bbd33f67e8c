"""A recorded training step draws new dropout masks each time that it is replayed, as a CUDA graph is.

There need be no GPU: a graph of torch's operations stands in for a CUDA graph. It too repeats every integer that the
host passed while it was recorded, and the random operations in it draw again.
"""

from typing import Any

import pytest
import torch
from interpreter import DEVICE
from models import tiny_config, token_ids
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fastgpt

DROPOUT = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}


def step_of(model: Any, seen: Any) -> Any:
    """A function of the weights that gives what the model computes and the gradients."""
    weights = dict(model.named_parameters())

    def step(*values: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in values]
        named = dict(zip(weights, leaves, strict=True))
        output = torch.func.functional_call(model, named, seen, {"use_cache": False}).last_hidden_state
        return [output.detach(), *torch.autograd.grad(output.square().mean(), leaves)]

    return step


def recorded(step: Any, weights: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> GraphModule:
    """The step as a graph in which each kernel is one operation, as under torch.compile."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return make_fx(step)(*weights)


@pytest.mark.parametrize("dropout", DROPOUT)
def test_masks_are_new_at_each_replay_and_those_of_an_eager_step(dropout: str, monkeypatch) -> None:
    """Each place of dropout alone."""
    with torch.device(DEVICE), fastgpt.backend("triton"):
        torch.manual_seed(0)
        none = dict.fromkeys(DROPOUT, 0.0)
        model = fastgpt.GPT2Model(tiny_config(n_layer=1, n_embd=32, n_head=2, **none | {dropout: 0.3})).train()
        weights = [parameter.detach() for parameter in model.parameters()]
        step = step_of(model, token_ids(1, 7, 131))
        graph = recorded(step, weights, monkeypatch)
        kernels = {
            str(node.target).split(".")[1] for node in graph.graph.nodes if "fastgpt_kernels" in str(node.target)
        }
        assert {"causal_attention", "causal_attention_backward", "gelu_mlp", "gelu_mlp_backward"} <= kernels
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            replayed = graph(*weights)
            torch.manual_seed(seed)
            for ours, eager in zip(replayed, step(*weights), strict=True):
                torch.testing.assert_close(ours, eager)
            results.append(replayed[0])
        assert not torch.allclose(*results)
