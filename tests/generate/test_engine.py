"""The engine gives transformers' tokens, also at the context's end and one at a time."""

import copy
import gc
import tracemalloc
from typing import Any

import pytest
import torch
import transformers
from models import assert_same_within_rounding, look_trained, pair, tiny_config, token_ids
from prompts import left_padded, ragged
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import fastgpt
from fastgpt import generate as engine
from fastgpt.model.compat import CACHE

GREEDY = {"do_sample": False, "eos_token_id": None}
THE_ENGINE = "generate: the engine"


# --- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_embd": 256, "n_head": 2},
        {"n_embd": 66, "n_head": 2},
        {"n_inner": 100, "activation_function": "relu"},
        {"activation_function": "gelu", "tie_word_embeddings": False},
        {"activation_function": "silu", "layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu_fast", "scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    ],
    ids=str,
)
def test_greedy_tokens_equal_transformers(changes: dict, route) -> None:
    theirs, ours = pair(tiny_config(n_positions=96, **changes))
    prompts = ragged(4, 131)
    for inputs in (left_padded(prompts), left_padded(prompts[:1]), left_padded(prompts[2:3])):
        options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
        assert ours.generate(**inputs, **options).tolist() == theirs.generate(**inputs, **options).tolist()
        assert route() == [THE_ENGINE]


@pytest.mark.parametrize("weights", ["trained-like", "demo"])
def test_sixteen_ragged_prompts_equal_transformers_and_singles(weights: str, route) -> None:
    if weights == "demo":
        ours = fastgpt.load_demo()[0]
    else:
        torch.manual_seed(0)
        config = tiny_config(n_embd=192, n_layer=4, vocab_size=1001, n_positions=256)
        ours = look_trained(fastgpt.GPT2LMHeadModel(config)).eval()
    theirs = fastgpt.unpatch(copy.deepcopy(ours))
    prompts = ragged(16, ours.config.vocab_size)
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = left_padded(prompts)
    batch = ours.generate(**inputs, **options)
    assert batch.tolist() == theirs.generate(**inputs, **options).tolist()
    for row in (0, 6, 15):
        assert ours.generate(prompts[row], **options)[0, -200:].tolist() == batch[row, -200:].tolist()
    assert ours.generate(prompts, **options).tolist() == batch.tolist()
    assert set(route()) == {THE_ENGINE}


def test_list_of_prompts() -> None:
    _, ours = pair(tiny_config(pad_token_id=None))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids, mask = torch.tensor([[9, 9, 5], [1, 2, 3]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    expected = ours.generate(ids, attention_mask=mask, pad_token_id=9, **options)
    assert ours.generate([[5], torch.tensor([1, 2, 3])], pad_token_id=9, **options).tolist() == expected.tolist()
    assert ours.generate(input_ids=([5], [1, 2, 3]), **options)[:, 3:].tolist() == expected[:, 3:].tolist()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the list of prompts is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([torch.ones(2, 2, dtype=torch.long)], r"prompt 0 has shape \(2, 2\)"),
    ],
)
def test_lists_that_are_no_prompts(prompts: list[Any], message: str) -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match=message):
        ours.generate(prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match="needs no attention_mask"):
        ours.generate([[1, 2]], attention_mask=torch.ones(1, 2), max_new_tokens=2)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 9, "eos_token_id": [3, 17]},
        {"min_length": 24},
        {"max_length": 20},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 0, "min_p": 0.02},
        {"do_sample": True, "top_p": 0.8, "temperature": 1.5, "repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 5},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=7, pad_token_id=4, eos_token_id=5)},
    ],
    ids=str,
)
def test_options_equal_transformers(options: dict, route) -> None:
    """From the same torch.manual_seed where they sample."""
    theirs, ours = pair(tiny_config(n_positions=96))
    inputs = left_padded(ragged(3, 131))
    limits = {} if options.keys() & {"max_length", "generation_config"} else {"max_new_tokens": 30}
    sequences = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        sequences.append(model.generate(**inputs, **options, **limits).tolist())
    assert sequences[1] == sequences[0]
    assert route() == [THE_ENGINE]


def test_rows_stop_at_end_of_text_and_are_padded() -> None:
    theirs, ours = pair(tiny_config(n_positions=96))
    inputs = left_padded(ragged(6, 131))
    free = ours.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    ends = [int(free[row, 16 + 5 * row]) for row in range(3)]
    for eos in (ends[0], ends):
        options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": eos, "pad_token_id": 99}
        sequences = ours.generate(**inputs, **options)
        assert sequences.tolist() == theirs.generate(**inputs, **options).tolist()
        assert (sequences == 99).any()
        assert sequences.is_contiguous()


def test_return_dict_holds_a_cache_to_continue_from() -> None:
    theirs, ours = pair(tiny_config(n_positions=96))
    ids = token_ids(2, 9, 131)
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    outputs: list[Any] = [model.generate(ids, max_new_tokens=11, **options) for model in (theirs, ours)]
    expected, output = outputs
    assert type(output) is type(expected)
    assert output.keys() == expected.keys()
    assert output.sequences.tolist() == expected.sequences.tolist()
    for layer, expected_layer in zip(output[CACHE].layers, expected[CACHE].layers, strict=True):
        assert_same_within_rounding(layer.keys, expected_layer.keys)
        assert_same_within_rounding(layer.values, expected_layer.values)
    continued = ours.generate(output.sequences, max_new_tokens=7, **{CACHE: output[CACHE]}, **options)
    whole = ours.generate(ids, max_new_tokens=18, **options)
    assert continued.sequences.tolist() == whole.sequences.tolist()


def test_padded_slots_of_a_returned_cache_hold_zeros() -> None:
    """All other slots hold what transformers stores."""
    theirs, ours = pair(tiny_config(n_positions=96))
    inputs = left_padded(ragged(3, 131))
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "max_new_tokens": 5}
    expected, output = (model.generate(**inputs, **options)[CACHE] for model in (theirs, ours))
    n_new = output.get_seq_length() - inputs["attention_mask"].shape[1]
    shown = torch.nn.functional.pad(inputs["attention_mask"], (0, n_new), value=1).bool()
    assert not shown.all()
    for layer, expected_layer in zip(output.layers, expected.layers, strict=True):
        for values, expected_values in ((layer.keys, expected_layer.keys), (layer.values, expected_layer.values)):
            values, expected_values = values.transpose(1, 2), expected_values.transpose(1, 2)  # (B, T, H, D)
            assert_same_within_rounding(values[shown], expected_values[shown])
            assert not values[~shown].any()
            assert expected_values[~shown].any()


def test_generated_tokens_can_be_trained_on() -> None:
    _, ours = pair(tiny_config())
    ids = ours.generate(token_ids(1, 4, 131), max_new_tokens=5, do_sample=False)
    ours.train()(ids, labels=ids).loss.backward()
    assert ours.transformer.wte.weight.grad.abs().sum() > 0


# --- limits ---------------------------------------------------------------------------------------------------------


def test_context_ends_where_the_longest_row_ends(route) -> None:
    _, ours = pair(tiny_config(n_positions=20))
    options = {"do_sample": False, "eos_token_id": None}
    inputs = left_padded([token_ids(1, 4, 131), token_ids(1, 12, 131)])
    assert ours.generate(**inputs, max_new_tokens=9, **options).shape == (2, 21)
    with pytest.raises(ValueError, match="position 20 is outside the context: n_positions is 20"):
        ours.generate(**inputs, max_new_tokens=10, **options)
    with pytest.raises(ValueError, match="token id 131 "):
        ours.generate(torch.tensor([[131]]), max_new_tokens=2, **options)
    assert set(route()) == {THE_ENGINE}


class _Collect(BaseStreamer):
    def __init__(self) -> None:
        self.received: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.received.append(value)

    def end(self) -> None:
        self.received.append("end")


def test_streamer_gets_the_prompt_and_then_every_token() -> None:
    _, ours = pair(tiny_config())
    streamer, ids = _Collect(), token_ids(3, 8, 131)
    sequences = ours.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None, streamer=streamer)
    prompt, *tokens, end = streamer.received
    assert torch.equal(prompt, ids)
    assert end == "end"
    assert torch.equal(torch.stack(tokens, 1), sequences[:, 8:])


def test_stream_gives_the_tokens_as_they_come(monkeypatch) -> None:
    _, ours = pair(tiny_config())
    forwards, decode = [], engine.decode_one_token
    monkeypatch.setattr(engine.host_loop, "decode_one_token", lambda *call: forwards.append(1) or decode(*call))
    ids, options = token_ids(3, 8, 131), {"max_new_tokens": 7, "do_sample": True, "seed": 3, "eos_token_id": None}
    expected = ours.generate(ids, **options)[:, 8:]
    forwards.clear()
    received = []
    for tokens in ours.stream(ids, **options):
        assert torch.is_grad_enabled()
        assert len(forwards) == len(received)  # the first token is the prompt's
        received.append(tokens.clone())
    assert torch.equal(torch.stack(received, 1), expected)
    assert [len(tokens) for tokens in ours.stream([[1, 2], [3]], max_new_tokens=2, **GREEDY)] == [2, 2]
    some = ours.stream(ids, prompt_lookup_num_tokens=None, **options)
    next(some)
    some.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores was asked for"),
        ({"num_beams": 2}, "streamer"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be"),
        ({"use_cache": False}, "the cache is off"),
    ],
    ids=str,
)
def test_stream_refuses_at_once_what_it_cannot_give(options: dict, reason: str) -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match=reason):
        ours.stream(token_ids(1, 8, 131), max_new_tokens=3, **options)


# --- the decode step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_decode_step_equals_the_blocks(dtype: torch.dtype, padded: bool) -> None:
    """One token over the cache, and three at once, beside the whole sequence through the model's own blocks."""
    _, ours = pair(tiny_config(n_layer=3))
    ours.to(dtype)
    ids, mask = token_ids(3, 12, 131), None
    positions = torch.arange(12)[None]
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    weights = engine.view_weights(ours)
    cache, other_cache = (engine.KVCache.allocate(ours, 3, 12) for _ in range(2))
    assert weights.layers[1].qkv_weight is ours.transformer.h[1].attn.c_attn.weight
    first = engine.prefill(ours, cache, ids[:, :9], None if mask is None else mask[:, :9], positions[:, :9])
    steps = [engine.decode_one_token(weights, cache, ids[:, t], positions[:, t]) for t in range(9, 12)]
    engine.prefill(ours, other_cache, ids[:, :9], None if mask is None else mask[:, :9], positions[:, :9])
    together = engine.decode_tokens(weights, other_cache, ids[:, 9:], positions[:, 9:])
    expected = ours(ids, attention_mask=mask, position_ids=positions).logits[:, 8:]
    n_ulps = 64 if dtype.itemsize > 2 else 4
    assert_same_within_rounding(torch.stack([first, *steps], 1), expected, n_ulps)
    assert_same_within_rounding(together, expected[:, 1:], n_ulps)
    if dtype == torch.float32:
        wrong = engine.decode_one_token(weights, engine.KVCache.allocate(ours, 3, 1), ids[:, 11], positions[:, 11])
        assert (wrong - expected[:, -1]).abs().max() > 0.1, "this test does not see the cache"


def test_two_thousand_steps_without_growth() -> None:
    """Over mixed lengths and batch sizes: Python's memory does not grow, and no tensor outlives its call."""
    _, ours = pair(tiny_config(n_layer=1, n_positions=128))

    def steps(n_calls: int) -> None:
        for call in range(n_calls):
            inputs = left_padded(ragged(1 + call % 3, 131, longest=7 + call % 5))
            n_new = 60 + 20 * (call % 3)
            ours.generate(**inputs, max_new_tokens=n_new, do_sample=call % 2 == 0, eos_token_id=None, seed=call)

    def n_tensors() -> int:
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    steps(3)
    gc.collect()
    tensors = n_tensors()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    steps(25)
    gc.collect()
    growth = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert n_tensors() == tensors
    assert growth < 64 * 1024, f"{growth} bytes"
