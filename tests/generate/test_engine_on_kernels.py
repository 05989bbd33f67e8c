"""Generation on the kernels gives transformers' tokens, and with a seed the same ones as on a CPU."""

from typing import Any

import pytest
import torch
import transformers
from interpreter import DEVICE, INTERPRETING
from models import token_ids
from prompts import left_padded, ragged
from small_models import let_persistent_run, small_pair
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

import fastgpt
from fastgpt.generate import kept, routing, workspace
from fastgpt.generate import options as sampling
from fastgpt.model import blocks
from fastgpt.model.compat import CACHE

pytestmark = pytest.mark.usefixtures("on_kernels")

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in inputs.items()}


@pytest.mark.parametrize("n_rows", [1, 4, 6])
def test_greedy_tokens_equal_transformers(n_rows: int, route) -> None:
    theirs, ours = small_pair(n_layer=2)
    inputs = on_device(left_padded(ragged(n_rows + 2, 131)[2:]))
    expected = theirs.generate(**inputs, **GREEDY, max_new_tokens=10)
    assert ours.generate(**inputs, **GREEDY, max_new_tokens=10).tolist() == expected.tolist()
    assert set(route()) == {"generate: the engine, on kernels"}


@pytest.mark.parametrize(("bits", "n_rows", "head"), [(8, 1, False), (8, 6, True), (4, 1, True), (4, 6, False)])
def test_rounded_weights_give_the_tokens_of_their_floats(bits: int, n_rows: int, head: bool, route) -> None:
    """Also where the same model was called before, and its workspace kept, with other weights."""
    theirs, ours = small_pair()
    inputs = on_device(left_padded(ragged(n_rows + 2, 131)[2:]))
    ours.generate(**inputs, **GREEDY, max_new_tokens=6)
    options: dict[str, Any] = {"bits": bits, "group_size": 32, "head": head}
    expected = fastgpt.quantize(theirs, **options).generate(**inputs, **GREEDY, max_new_tokens=6)
    fastgpt.quantize(ours, **options)
    assert ours.generate(**inputs, **GREEDY, max_new_tokens=6).tolist() == expected.tolist()
    assert set(route()) == {"generate: the engine, on kernels"}
    with workspace.tier("persistent"):
        assert f"because the persistent kernel reads no int{bits} weights" in fastgpt.explain(ours)


def test_rows_stop_at_end_of_text_and_are_padded() -> None:
    theirs, ours = small_pair()
    inputs = on_device(left_padded(ragged(3, 131)))
    free = theirs.generate(**inputs, **GREEDY, max_new_tokens=9)
    n_prompt = inputs["input_ids"].shape[1]
    for ends in ([int(free[0, n_prompt + 2])], [int(free[row, n_prompt + 2 + row]) for row in range(3)]):
        options = GREEDY | {"eos_token_id": ends, "pad_token_id": 99, "max_new_tokens": 9}
        assert ours.generate(**inputs, **options).tolist() == theirs.generate(**inputs, **options).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 5, "eos_token_id": [3, 17, 29]},
        {"min_new_tokens": 5, "eos_token_id": 50256, "pad_token_id": 50256},
        {"max_length": 20},
        {"do_sample": True, "seed": 5, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
        {"do_sample": True, "seed": 5, "top_k": 0, "min_p": 0.02, "num_return_sequences": 2, "max_new_tokens": 5},
        {"do_sample": True, "seed": 2**63 + 1, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_options_equal_the_torch_path(options: dict[str, Any], route) -> None:
    _, ours = small_pair()
    inputs = on_device(left_padded(ragged(2, 131)))
    options = GREEDY | ({} if "max_length" in options else {"max_new_tokens": 6}) | options
    with fastgpt.backend("torch"):
        expected = ours.generate(**inputs, **options)
    assert ours.generate(**inputs, **options).tolist() == expected.tolist()
    assert "generate: the engine, on kernels" in route()


def test_unseeded_draws_follow_torch_manual_seed_and_differ_between_equal_rows() -> None:
    _, ours = small_pair()
    ids = token_ids(1, 5, 131).expand(3, -1).to(DEVICE)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ours.generate(ids, do_sample=True, top_k=0, max_new_tokens=8, eos_token_id=None).tolist())
    assert runs[0] == runs[1] != runs[2]
    assert len(set(map(tuple, runs[0]))) == 3


def test_nan_logits_are_refused() -> None:
    _, ours = small_pair()
    ours.transformer.ln_f.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        ours.generate(token_ids(1, 5, 131).to(DEVICE), **GREEDY, max_new_tokens=3)


def test_nan_logits_of_a_later_step_are_refused() -> None:
    """The host looks one step behind: the poisoned token goes into a step, and must not stop it."""
    theirs, ours = small_pair()
    ids = token_ids(1, 5, 131).to(DEVICE)
    ours.transformer.wpe.weight.data[7] = float("nan")
    streamed: list[int] = []

    class Collect(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None: ...

    with pytest.raises(ValueError, match="logits are NaN"):
        ours.generate(ids, **GREEDY, max_new_tokens=9, streamer=Collect())
    assert streamed == theirs.generate(ids, **GREEDY, max_new_tokens=3)[0].tolist()


def test_context_ends_where_the_longest_row_ends() -> None:
    _, ours = small_pair(n_positions=14)
    inputs = on_device(left_padded([token_ids(1, 4, 131), token_ids(1, 8, 131)]))
    assert ours.generate(**inputs, **GREEDY, max_new_tokens=7).shape == (2, 15)
    with pytest.raises(ValueError, match="position 14 is outside the context: n_positions is 14"):
        ours.generate(**inputs, **GREEDY, max_new_tokens=8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("more", [{}, {"prompt_lookup_num_tokens": 4}], ids=["plain", "lookup"])
def test_bug_a_prompt_past_the_context_was_left_to_its_forward(
    backend: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that does not look at positions, and then torch's assertion ends all use of the GPU."""
    monkeypatch.setattr(blocks, "check_positions", lambda *_: None)
    _, ours = small_pair(n_positions=14)
    with fastgpt.backend(backend), pytest.raises(ValueError, match="position 15 is outside the context"):
        ours.generate(token_ids(1, 16, 131).to(DEVICE), **GREEDY, **more, max_new_tokens=2)


def test_return_dict_holds_the_cache() -> None:
    theirs, ours = small_pair(n_layer=2)
    ids = token_ids(2, 6, 131).to(DEVICE)
    options = GREEDY | {"return_dict_in_generate": True, "max_new_tokens": 5}
    expected, found = theirs.generate(ids, **options), ours.generate(ids, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for layer, expected_layer in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.keys, rtol=1e-5, atol=1e-5)
    kept = found[CACHE].layers[0].keys.clone()
    ours.generate(token_ids(2, 6, 131, seed=9).to(DEVICE), **GREEDY, max_new_tokens=5)
    assert torch.equal(found[CACHE].layers[0].keys, kept), "the next call wrote into a returned cache"


# --- prompt lookup --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_proposed", "options"),
    [
        (2, {}),
        (2, {"do_sample": True, "seed": 5, "temperature": 0.3}),
        (6, {"max_new_tokens": 7}),
        (6, {"eos_token_id": list(range(0, 131, 9))}),
        (6, {"min_new_tokens": 8, "eos_token_id": list(range(0, 131, 3))}),
        (6, {"do_sample": True, "seed": 5, "temperature": 0.3}),
        (6, {"do_sample": True, "top_k": 3}),
        (6, {"attention_mask": torch.tensor([[0] * 3 + [1] * 9])}),
        (6, {"return_dict_in_generate": True}),
    ],
    ids=str,
)
def test_lookup_gives_the_tokens_that_come_without(n_proposed: int, options: dict[str, Any], route) -> None:
    """From the same torch.manual_seed where they sample, in few rows and in many."""
    _, ours = small_pair()
    ids = token_ids(1, 4, 131).repeat(1, 3).to(DEVICE)
    options = GREEDY | {"max_new_tokens": 14} | options
    if "attention_mask" in options:
        options["attention_mask"] = options["attention_mask"].to(DEVICE)
    torch.manual_seed(1)
    expected = ours.generate(ids, **options)
    torch.manual_seed(1)
    looked_up = ours.generate(ids, prompt_lookup_num_tokens=n_proposed, **options)
    if "return_dict_in_generate" in options:
        pairs = zip(looked_up[CACHE].layers, expected[CACHE].layers, strict=True)
        for layer, expected_layer in pairs:
            torch.testing.assert_close(layer.keys, expected_layer.keys, rtol=1e-4, atol=1e-5)
        expected, looked_up = expected.sequences, looked_up.sequences
    assert looked_up.tolist() == expected.tolist()
    assert set(route()) == {"generate: the engine, on kernels"}


def test_lookup_takes_fewer_steps_of_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = small_pair()
    with torch.no_grad():  # what follows a token is then decided by the token alone
        ours.transformer.h[0].attn.c_proj.weight.zero_()
        ours.transformer.wpe.weight.zero_()
    sizes, decode = [], workspace.Workspace.decode
    monkeypatch.setattr(
        workspace.Workspace, "decode", lambda self, model, n_new=1: sizes.append(n_new) or decode(self, model, n_new)
    )
    ids = token_ids(1, 3, 131).to(DEVICE)
    looked_up = ours.generate(ids, prompt_lookup_num_tokens=5, max_new_tokens=40, **GREEDY)
    assert set(sizes) == {1, 6}
    assert len(sizes) < 25
    assert looked_up.tolist() == ours.generate(ids, max_new_tokens=40, **GREEDY).tolist()


def test_lookup_fills_the_context_and_no_more() -> None:
    _, ours = small_pair()
    options = GREEDY | {"prompt_lookup_num_tokens": 4}
    ids = token_ids(1, 5, 131).repeat(1, 10).to(DEVICE)
    assert ours.generate(ids, max_new_tokens=15, **options).shape == (1, 65)
    with pytest.raises(ValueError, match="position 64 is outside the context"):
        ours.generate(ids, max_new_tokens=16, **options)


def test_lookup_refuses_nan_logits() -> None:
    _, ours = small_pair()
    ours.transformer.wpe.weight.data[14] = float("nan")
    ids = token_ids(1, 4, 131).repeat(1, 3).to(DEVICE)
    with pytest.raises(ValueError, match="logits are NaN"):
        ours.generate(ids, prompt_lookup_num_tokens=4, max_new_tokens=9, **GREEDY)


def test_lookup_with_a_repetition_penalty_is_left_to_torch(route) -> None:
    _, ours = small_pair()
    ids, options = token_ids(1, 5, 131).to(DEVICE), GREEDY | {"repetition_penalty": 1.3, "max_new_tokens": 4}
    looked_up = ours.generate(ids, prompt_lookup_num_tokens=4, **options)
    assert looked_up.tolist() == ours.generate(ids, **options).tolist()
    assert "prompt lookup with a repetition penalty has no kernel" in " ".join(route())


@pytest.mark.parametrize("name", ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.ln_1.bias", "lm_head.weight"])
def test_bug_negated_weights_are_read_without_their_sign(name: str) -> None:
    """The memory of a view with torch's negative bit, which the kernels would read, holds values without their sign."""
    theirs, ours = small_pair()
    ids, options = token_ids(1, 5, 131).to(DEVICE), GREEDY | {"max_new_tokens": 8}
    ours.generate(ids, **options)
    for model in (theirs, ours):
        weight = model.get_parameter(name)
        weight.data = torch._neg_view(weight.data * 2)
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
    assert "a parameter has torch's negative bit" in fastgpt.explain(ours)


# --- tiers ----------------------------------------------------------------------------------------------------------


def test_unknown_tier() -> None:
    with pytest.raises(ValueError, match="unknown tier 'fast'"), workspace.tier("fast"):
        pass


def test_persistent_tier_equals_transformers(route, monkeypatch: pytest.MonkeyPatch) -> None:
    let_persistent_run(monkeypatch)
    theirs, ours = small_pair(n_embd=128, n_head=2, n_layer=2)
    ids, options = token_ids(1, 7, 131).to(DEVICE), GREEDY | {"max_new_tokens": 5}
    with workspace.tier("persistent"):
        assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
        assert "generate: the engine, on kernels" in route()
        assert "one row, not 2" in str(workspace.obstacle(ours, 2))


@pytest.mark.skipif(INTERPRETING, reason="needs a GPU")
def test_graph_replays_what_eager_launches() -> None:
    _, ours = small_pair(n_layer=2)
    inputs = on_device(left_padded(ragged(3, 131)))
    runs = []
    for name in ("eager", "graph"):
        with workspace.tier(name):
            runs.append([ours.generate(**inputs, **GREEDY, max_new_tokens=30).tolist() for _ in range(2)])
    assert 1 in kept.workspaces(ours)[-1]._replays
    assert None not in kept.workspaces(ours)[-1].choices._replays.values()
    assert runs[0] == runs[1]


# --- routing --------------------------------------------------------------------------------------------------------


def test_describe_names_the_kernels() -> None:
    _, ours = small_pair()
    with torch.no_grad():
        assert routing.describe(ours).startswith("the engine: static cache, kernels")
        assert "float64" in routing.describe(ours.double())


@pytest.mark.parametrize(
    "processors",
    [
        [logits_process.TopPLogitsWarper(0.9), logits_process.TopKLogitsWarper(5)],
        [logits_process.TopKLogitsWarper(5), logits_process.TopKLogitsWarper(3)],
        [logits_process.TopPLogitsWarper(0.9, min_tokens_to_keep=2)],
        [logits_process.TopKLogitsWarper(5, filter_value=-1.0)],
    ],
    ids=["order", "twice", "least", "filter"],
)
def test_processors_that_the_sampling_kernel_does_not_stand_in_for(processors: list[Any], route) -> None:
    assert sampling.device_options(LogitsProcessorList(processors), True, 1, torch.device(DEVICE)) is None
    _, ours = small_pair()
    ids = token_ids(1, 5, 131).to(DEVICE)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "logits_processor": LogitsProcessorList(processors)}
    ours.generate(ids, **options)
    assert "its logits processors have no kernel" in " ".join(route())
