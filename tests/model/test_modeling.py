"""The drop-in models give transformers' numbers: logits, hidden states, losses and gradients."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from interpreter import DEVICE
from models import (
    HEADS,
    NO_DROPOUT,
    assert_same_within_rounding,
    family,
    lively,
    look_trained,
    pair,
    tiny_config,
    token_ids,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GPT2Config

import fastgpt
from fastgpt.model.compat import CACHE


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name in ours:
        # Some gradients are zero in exact arithmetic (a bias before a softmax): what is left of them is rounding.
        scale = max(theirs[name].abs().max().item(), 1e-2 * largest)
        error = (ours[name] - theirs[name]).abs().max().item()
        assert error <= 256 * torch.finfo(torch.float32).eps * scale, f"{name} differs by {error:.3g} of {scale:.3g}"


# --- the family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", family())
def test_family_equals_transformers(name: str) -> None:
    """Full width and vocabulary, a layer or two: the same model runs once as transformers' and once patched."""
    fields: dict[str, Any] = family()[name] | NO_DROPOUT | {"n_layer": 2}
    if fields["n_embd"] > 2000:  # the width is what is tested here; memory on small machines is not
        fields |= {"vocab_size": 1001, "n_layer": 1}
    torch.manual_seed(0)
    model = lively(transformers.GPT2LMHeadModel(GPT2Config(**fields))).train()
    ids = token_ids(2, 13, fields.get("vocab_size", 50257))
    inputs = {"input_ids": ids, "labels": ids, "output_hidden_states": True}
    if fields.get("add_cross_attention"):
        inputs["encoder_hidden_states"] = torch.randn(2, 7, fields["n_embd"])
        inputs["encoder_attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])

    results = []
    for side in ("transformers", "fastgpt"):
        if side == "fastgpt":
            fastgpt.patch(model)
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        results.append((outputs.loss.detach(), outputs.logits.detach(), outputs.hidden_states, gradients(model)))

    theirs, ours = results
    assert_same_within_rounding(ours[0], theirs[0])
    assert_same_within_rounding(ours[1], theirs[1])
    assert len(ours[2]) == len(theirs[2]) == fields["n_layer"] + 1
    for our_state, their_state in zip(ours[2], theirs[2], strict=True):
        assert_same_within_rounding(our_state, their_state)
    assert_same_gradients(ours[3], theirs[3])


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("attn_pdrop", [0.0, 0.1])
def test_bug_heads_of_one_channel_are_not_dense(attn_pdrop: float, is_padded: bool) -> None:
    """As in sshleifer/tiny-gpt2: torch reshapes their output without a copy, and Conv1D cannot view it as rows."""
    theirs, ours = pair(tiny_config(n_embd=2, n_head=2, attn_pdrop=attn_pdrop))
    ids, mask = token_ids(3, 9, 131), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0 if is_padded else 1
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    assert_same_within_rounding(ours(**inputs).loss, theirs(**inputs).loss)
    loss = ours.train()(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(ours).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 128, "n_head": 2},
        {"n_embd": 160, "n_head": 2},
        {"n_embd": 96, "n_head": 1},
        {"n_embd": 128, "n_head": 1},
        {"n_embd": 66, "n_head": 2},
        {"n_inner": 100},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "relu"},
        {"activation_function": "silu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_python"},
        {"activation_function": "mish"},
        {"vocab_size": 1},
        {"layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_configuration_equals_transformers(changes: dict) -> None:
    theirs, ours = pair(tiny_config(**changes))
    ids = token_ids(2, 21, max(2, theirs.config.vocab_size)) % theirs.config.vocab_size
    for model in (theirs, ours):
        model.train()
        model(ids, labels=ids).loss.backward()
    assert_same_within_rounding(ours(ids).logits, theirs(ids).logits)
    assert_same_gradients(gradients(ours), gradients(theirs))


def test_scaling_flags_change_the_result() -> None:
    config = tiny_config(n_layer=3)
    _, plain = pair(config)
    logits = plain(token_ids(1, 9, 131)).logits
    for flag in ({"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}):
        _, scaled = pair(tiny_config(n_layer=3, **flag))
        assert (scaled(token_ids(1, 9, 131)).logits - logits).abs().max() > 1e-3


# --- gpt2 itself ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(GPT2Config()).eval()


@torch.no_grad()
def test_full_size_gpt2(full_size: Any) -> None:
    ids = torch.tensor([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
    expected = full_size(ids).logits
    fastgpt.patch(full_size)
    logits = full_size(ids).logits
    fastgpt.unpatch(full_size)
    assert logits.shape == (2, 4, 50257)
    assert_same_within_rounding(logits, expected)


@torch.no_grad()
def test_error_on_trained_like_weights_is_not_above_transformers(full_size: Any) -> None:
    """Against float64: root-mean-square logit error at most transformers' own, in fp32 and bf16."""
    model = look_trained(copy.deepcopy(full_size))
    ids = token_ids(2, 48, 50257)
    truth = copy.deepcopy(model).double()(ids).logits
    assert truth.abs().max() > 50, "the weights do not look trained"

    def error(model: Any) -> float:
        return (model(ids).logits.double() - truth).square().mean().sqrt().item()

    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        theirs = error(model)
        ours = error(fastgpt.patch(model))
        fastgpt.unpatch(model)
        assert theirs > 0
        assert ours <= 1.05 * theirs, f"{dtype}: {ours:.4g} against transformers' {theirs:.4g}"


# --- heads ----------------------------------------------------------------------------------------------------------


def labels_for(head: str, ids: Tensor) -> dict[str, Tensor]:
    n_batch, n_tokens = ids.shape[0], ids.shape[-1]
    return {
        "GPT2Model": {},
        "GPT2LMHeadModel": {"labels": ids},
        "GPT2DoubleHeadsModel": {"labels": ids, "mc_labels": torch.tensor([0, 1])},
        "GPT2ForSequenceClassification": {"labels": torch.arange(n_batch) % 2},
        "GPT2ForTokenClassification": {"labels": ids % 2},
        "GPT2ForQuestionAnswering": {
            "start_positions": torch.zeros(n_batch, dtype=torch.long),
            "end_positions": torch.full((n_batch,), n_tokens - 1),
        },
    }[head]


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str) -> None:
    theirs, ours = pair(tiny_config(classifier_dropout=0.0, summary_first_dropout=0.0), head)
    ids = token_ids(4, 11, 131).view(2, 2, 11) if head == "GPT2DoubleHeadsModel" else token_ids(2, 11, 131)
    outputs = []
    for model in (theirs.train(), ours.train()):
        output = model(ids, **labels_for(head, ids), output_hidden_states=True)
        scalar = output.loss if head != "GPT2Model" else output.last_hidden_state.square().sum()
        (scalar + (output.mc_loss if head == "GPT2DoubleHeadsModel" else 0)).backward()
        outputs.append(output)
    for our_value, their_value in zip(outputs[1].to_tuple(), outputs[0].to_tuple(), strict=True):
        if isinstance(their_value, Tensor):
            assert_same_within_rounding(our_value, their_value)
    assert type(ours).__name__ == head
    assert isinstance(ours, getattr(transformers, head))
    assert_same_gradients(gradients(ours), gradients(theirs))


def test_training_loss_takes_every_option_of_transformers() -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    labels = ids.clone()
    labels[0, :4] = -100
    ours.train()
    for options in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 11},
        {"labels": labels, "num_items_in_batch": torch.tensor(11)},
        {"labels": labels, "shift_labels": torch.roll(labels, -1, 1)},
        {"labels": ids, "ignore_index": int(ids[0, 3])},
        {"labels": torch.full_like(labels, -100)},
    ):
        expected, loss = theirs(ids, **options).loss, ours(ids, **options).loss
        assert torch.allclose(loss, expected, rtol=2e-6, atol=0, equal_nan=True), options


def test_bug_a_training_loss_in_inference_mode_raised() -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    ours.train()
    with torch.inference_mode():
        expected, output = theirs(ids, labels=ids), ours(ids, labels=ids)
        assert_same_within_rounding(output.loss, expected.loss)
        assert_same_within_rounding(output.logits, expected.logits)


def test_bug_a_training_step_could_not_be_traced() -> None:
    theirs, ours = pair(tiny_config(n_layer=1, use_cache=False))
    ids, others = token_ids(2, 9, 131), token_ids(2, 9, 131, seed=1)

    class Step(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            output = self.model(ids, labels=ids)
            return output.loss, output.logits

    traced: Any = torch.jit.trace(Step(ours.train()), ids, check_trace=False)
    for value, expected in zip(traced(others), Step(theirs)(others), strict=True):
        assert_same_within_rounding(value, expected)


@pytest.mark.parametrize("n_rows", [130, 132])
def test_bug_a_head_of_another_size_than_the_vocabulary_failed_only_in_evaluation(n_rows: int) -> None:
    theirs, ours = pair(tiny_config(tie_word_embeddings=False))
    ids = token_ids(2, 9, 130)
    for model in (theirs, ours):
        model.lm_head = torch.nn.Linear(64, n_rows, bias=False)
        for is_training in (True, False):
            with pytest.raises(RuntimeError, match="invalid for input of size"):
                model.train(is_training)(ids, labels=ids)


def test_custom_loss_is_used() -> None:
    _, ours = pair(tiny_config())
    ours.train().loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
    ids = token_ids(1, 5, 131)
    assert ours(ids, labels=ids).loss.item() == 42


# --- copies ---------------------------------------------------------------------------------------------------------


class LargeCopies(TorchDispatchMode):
    """Counts the operations that copy n_elements or more, by name."""

    def __init__(self, n_elements: int):
        super().__init__()
        self.n_elements = n_elements
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # Not copy_, by which the kernels' interpreter fetches what it reads.
        if name in ("clone", "cat", "stack", "_to_copy") and result.numel() >= self.n_elements:
            self.counts[name] += 1
        return result


@pytest.mark.parametrize("is_patched", [False, True])
def test_a_training_step_copies_no_keys_into_its_cache(is_patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds what transformers' holds, unless its update is somebody else's."""
    theirs, ours = pair(tiny_config(n_layer=1))
    ids, update = token_ids(2, 5, 131), DynamicCache.update
    if is_patched:
        doubled = lambda *arguments, **options: [2 * x for x in update(*arguments, **options)]  # noqa: E731
        monkeypatch.setattr(DynamicCache, "update", doubled)
    results = []
    for model in (theirs.train(), ours.train()):
        with LargeCopies(2 * 5 * 64) as copies:
            output = model(ids, labels=ids)
        (output.loss + output[CACHE].layers[0].values.square().sum()).backward()
        grown = model(ids, **{CACHE: output[CACHE]}).logits
        weight = model.transformer.h[0].attn.c_attn.weight
        results.append((output.loss, output[CACHE].layers[0].keys, grown, weight.grad))
    assert copies.counts["cat"] == 2 * is_patched
    for value, expected in zip(results[1], results[0], strict=True):
        assert_same_within_rounding(value, expected)


def test_a_cache_gets_the_arguments_that_transformers_passes() -> None:
    class Noting(DynamicCache):
        def update(self, *arguments: Any, **options: Any) -> Any:
            seen.append((len(arguments), *({name: str(x) for name, x in given.items()} for given in options.values())))
            return super().update(*arguments, **options)

    calls = []
    for model in pair(tiny_config(n_layer=1)):
        seen: list[Any] = []
        model(token_ids(2, 5, 131), **{CACHE: Noting(config=model.config)}, custom=3)
        calls.append(seen)
    assert calls[1] == calls[0]


@pytest.mark.parametrize(("backend", "n_copies"), [("torch", 1), ("triton", 0)])
def test_gradients_of_packed_queries_keys_and_values(backend: str, n_copies: int) -> None:
    """The kernels write them where the product reads them; torch's attention gives three tensors, which are joined."""
    with fastgpt.backend(backend), torch.device(DEVICE):
        attention: Any = fastgpt.GPT2Model(tiny_config(n_layer=1)).train().h[0].attn
        hidden_states = torch.randn(2, 5, 64, requires_grad=True)
        attended = attention(hidden_states)[0]
        with LargeCopies(3 * hidden_states.numel()) as copies:
            attended.sum().backward()
    assert sum(copies.counts.values()) == n_copies


def test_autocast_casts_no_norm_in_a_pass_of_its_own() -> None:
    """A norm is written in the dtype of the product that reads it, unless somebody else may look at it."""
    seen: list[torch.dtype] = []
    counts = []
    for is_hooked in (False, True):
        with fastgpt.backend("triton"), torch.device(DEVICE):
            block: Any = fastgpt.GPT2Model(tiny_config(n_layer=1, n_embd=16, n_head=2)).train().h[0]
            if is_hooked:
                for reader in (block.attn, block.mlp):
                    reader.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
            hidden_states = torch.randn(2, 40, 16, requires_grad=True)
            with LargeCopies(hidden_states.numel()) as copies:
                with torch.autocast(DEVICE, torch.bfloat16):
                    output = block(hidden_states)
                output.backward(torch.ones_like(output))
        counts.append(copies.counts["_to_copy"])
    assert seen == [torch.float32] * 2
    # Where they are looked at: two norms, forward and backward, and the MLP's gradient.
    assert counts == [0, 5]
