"""Changes of a model's weights show in the next call of `generate()`, and moving them during a call is refused."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from interpreter import DEVICE, INTERPRETING
from small_models import let_persistent_run, prompt, small_pair
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from fastgpt import generate as engine
from fastgpt.generate import products
from fastgpt.generate.implementations import implementations_of

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
pytestmark = pytest.mark.usefixtures("backend")

# --- between calls --------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_place(model: Any) -> Any:
    model.transformer.h[0].mlp.c_fc.weight.neg_()
    return model


@torch.inference_mode()
def in_place_in_inference_mode(model: Any) -> Any:
    model.transformer.h[0].mlp.c_fc.weight.neg_()
    return model


def data_in_place(model: Any) -> Any:
    model.transformer.h[0].attn.c_attn.weight.data.mul_(-1)
    return model


def data_swapped(model: Any) -> Any:
    weight = model.transformer.h[0].mlp.c_proj.weight
    weight.data = weight.data.flip(1).contiguous()
    return model


@torch.no_grad()
def rows_exchanged(model: Any) -> Any:
    """The same numbers in another order, which a sum over them would not see."""
    weight = model.transformer.h[0].mlp.c_proj.weight
    weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(1)).to(DEVICE)])
    return model


def optimized(model: Any, **options: Any) -> Any:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.5, **options).step()
    model.zero_grad()
    return model


def optimized_fused(model: Any) -> Any:
    return optimized(model, fused=True)


def loaded(model: Any, **options: Any) -> Any:
    state = {name: -x for name, x in model.state_dict().items()}
    model.load_state_dict(state, **options)
    return model


def loaded_by_assignment(model: Any) -> Any:
    loaded(model, assign=True)
    model.tie_weights()
    return model


def replaced(model: Any) -> Any:
    attention = model.transformer.h[0].attn
    attention.c_proj.bias = nn.Parameter(-attention.c_proj.bias.detach())
    return model


def replaced_by_vector(model: Any) -> Any:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector.flip(0), model.parameters())
    return model


def merged_and_unloaded(model: Any) -> Any:
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    return peft.get_peft_model(model, config).merge_and_unload().eval()


@torch.no_grad()
def resized(model: Any) -> Any:
    """With new tokens that the model prefers to the others."""
    model.resize_token_embeddings(140, mean_resizing=False)
    weight = model.transformer.wte.weight
    new = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(1))
    weight[131:] = (8 * weight.std() * new.to(weight.device)).to(weight.dtype)
    return model


def constants(model: Any) -> Any:
    """Which are no weights, and are part of a captured step all the same."""
    model.transformer.ln_f.eps = model.config.layer_norm_epsilon = 0.5
    for block in model.transformer.h:
        block.ln_1.eps = block.ln_2.eps = 0.5
    return model


CHANGES = [
    in_place, in_place_in_inference_mode, data_in_place, data_swapped, rows_exchanged, optimized, optimized_fused,
    loaded, loaded_by_assignment, replaced, replaced_by_vector, merged_and_unloaded, resized, constants,
]  # fmt: skip


def tokens_of_transformers(model: Any) -> Tensor:
    theirs: Any = transformers.GPT2LMHeadModel(copy.deepcopy(model.config))
    theirs.to(DEVICE, model.dtype).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs.generate(prompt(), **GREEDY)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    ("tier", "backend"), [("auto", "torch"), ("auto", "triton"), ("persistent", "triton")], indirect=["backend"]
)
def test_weights_changed_between_calls(
    change: Callable[[Any], Any], tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_persistent_run(monkeypatch)
    _, ours = small_pair(n_embd=128)
    before = tokens_of_transformers(ours)
    # One step compiles and packs; a graph, which needs a GPU, is recorded in the next.
    n_first = 2 if INTERPRETING else 5
    with engine.tier(tier):
        first = ours.generate(prompt(), **GREEDY | {"max_new_tokens": n_first})
        assert torch.equal(first, before[:, : 5 + n_first])
        ours = change(ours)
        expected = tokens_of_transformers(ours)
        assert not torch.equal(expected, before), "the change is too small to be seen"
        assert torch.equal(ours.generate(prompt(), **GREEDY), expected)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # only the path for CPUs copies
def test_packed_copies_are_those_of_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MIN_STEPS", 1)
    monkeypatch.setattr(products, "fastest", lambda known, n_steps: list(known)[-1])
    _, ours = small_pair()
    assert list(implementations_of(ours.lm_head.weight, 1))[-1] == "packed"
    for change in (in_place, data_in_place, optimized_fused):
        stream = ours.stream(prompt(), **GREEDY)
        change(ours)
        assert torch.stack(list(stream), 1).tolist() == ours.generate(prompt(), **GREEDY)[:, 5:].tolist()


# --- during a call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [data_swapped, replaced, loaded_by_assignment, lambda model: model.double()])
def test_weights_moved_while_a_stream_waits(move: Callable[[Any], Any]) -> None:
    _, ours = small_pair()
    stream = ours.stream(prompt(), **GREEDY)
    next(stream)
    move(ours)
    with pytest.raises(RuntimeError, match="moved or replaced between two tokens"):
        next(stream)


def test_weights_moved_by_a_streamer() -> None:
    _, ours = small_pair()

    class Moves(BaseStreamer):
        def put(self, value: Tensor) -> None:
            data_swapped(ours)

        def end(self) -> None: ...

    with pytest.raises(RuntimeError, match="moved or replaced between two tokens"):
        ours.generate(prompt(), **GREEDY, streamer=Moves())
