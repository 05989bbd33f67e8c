"""The decode step as one kernel, against transformers in the same dtype and in float64."""

import copy
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, max_error
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, check_overflow, only_interpreted
from models import look_trained, pair, token_ids

from fastgpt.model.compat import CACHE

from .decoders import (
    DTYPES,
    HALF,
    HEADS_OF_WIDTH,
    SHIPPED,
    decode,
    doubled,
    keys_and_values,
    make_decoder,
    make_model,
    read_prompt,
    small_config,
    tuned,
)

PROFILE = settings.get_current_profile_name()
# A case takes a second or more: 3 of them, and 78 with the thorough profile.
FEW_CASES = settings(max_examples=max(1, settings.get_profile(PROFILE).max_examples // 8))


@torch.inference_mode()
def check(
    model: Any, n_past: int, *, n_steps: int = 1, start: int = 0, n_spare: int = 2, seed: int = 0, slack: float = 1.0
) -> None:
    """n_steps tokens behind a prompt of n_past, whose first slot is `start`, in a cache with n_spare slots behind."""
    ids = token_ids(1, n_past + n_steps, model.config.vocab_size, seed)
    n_slots = start + n_past + n_steps + n_spare
    cache, past = read_prompt(model, ids[:, :n_past], n_slots, start)
    exact, exact_past = copy.deepcopy(model).double(), doubled(past, model.config)
    before, decoder = cache.clone(), make_decoder(model)

    for position in range(n_past, n_past + n_steps):
        token = ids[:, position : position + 1]
        logits = decode(decoder, cache, int(token), position, start + position, start or None, seed + position)
        eager, truth = (m(token, **{CACHE: p}).logits[:, -1] for m, p in ((model, past), (exact, exact_past)))
        assert_as_accurate(logits.to(model.dtype), eager, truth, 1.25 * slack, slack)

    appended = slice(start + n_past, start + n_past + n_steps)
    theirs, truth = keys_and_values(past)[..., n_past:, :], keys_and_values(exact_past)[..., n_past:, :]
    for ours, eager, true in zip(cache[..., appended, :], theirs, truth, strict=True):
        assert_as_accurate(ours, eager, true, 1.25 * slack, slack)
    cache[..., appended, :] = torch.nan
    assert torch.equal(cache.isnan(), before.isnan())
    assert torch.equal(cache.nan_to_num(), before.nan_to_num())


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_programs", "dtype"), [*((n, dtype) for n in (1, 5) for dtype in DTYPES), (13, torch.bfloat16)]
)
def test_logits_and_cache_are_as_accurate_as_eager(n_programs: int, dtype: torch.dtype) -> None:
    with tuned(n_programs):
        check(make_model(small_config(), dtype), 21, n_steps=2)


@pytest.mark.parametrize("n_past", [0, 1, 62, 63, 64, 127, 128, 200])
def test_contexts_around_splits(n_past: int) -> None:
    with tuned(9):
        check(make_model(small_config(n_layer=1), torch.bfloat16), n_past)


@pytest.mark.parametrize("n_past", [126, 127, 128])
def test_contexts_around_a_block_of_keys(n_past: int) -> None:
    with tuned(1):
        check(make_model(small_config(n_layer=1), torch.float16), n_past)


@pytest.mark.parametrize(("n_past", "start"), [(0, 3), (70, 41)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_not_read(n_past: int, start: int, dtype: torch.dtype) -> None:
    with tuned(7):
        check(make_model(small_config(n_layer=1), dtype), n_past, start=start)


def test_last_slot_of_the_cache() -> None:
    with tuned(5):
        check(make_model(small_config(n_layer=1), torch.bfloat16), 9, n_spare=0)


def test_many_steps_without_a_reset() -> None:
    with tuned(3), check_overflow():
        check(make_model(small_config(64), torch.bfloat16), 3, n_steps=6)


@only_interpreted
@pytest.mark.parametrize("dtype", DTYPES if PROFILE == "thorough" else [torch.bfloat16])
def test_as_many_programs_as_an_h200_has(dtype: torch.dtype) -> None:
    with tuned(132, SHIPPED):
        check(make_model(small_config(n_layer=1), dtype), 70)


@pytest.mark.parametrize("n_channels", HEADS_OF_WIDTH)
def test_widths_of_gpt2(n_channels: int) -> None:
    with tuned(3, SHIPPED if PROFILE == "thorough" else SHIPPED._replace(groups=64)):
        check(make_model(small_config(n_channels, n_layer=1), torch.bfloat16), 5)


def test_tiles_that_ship() -> None:
    with tuned(13, SHIPPED):
        check(make_model(small_config(320, n_layer=1), torch.float16), 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_look_trained(dtype: torch.dtype) -> None:
    config = small_config(192, n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with tuned(5):
        check(look_trained(pair(config)[0]).to(DEVICE, dtype), 12)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_fast", "silu"])
def test_activations(activation: str) -> None:
    with tuned(2):
        check(make_model(small_config(64, activation_function=activation), torch.bfloat16), 4)


@torch.no_grad()
def test_a_head_of_its_own_at_an_odd_address() -> None:
    model = make_model(small_config(tie_word_embeddings=False), torch.bfloat16)
    memory = torch.randn(131 * 128 + 1, dtype=torch.bfloat16, device=DEVICE)
    model.lm_head.weight = torch.nn.Parameter(memory[1:].view(131, 128))
    with tuned(5):
        assert all(table.data_ptr() % 16 == 0 for table in make_decoder(model)._tables)
        check(model, 4)


@FEW_CASES
@given(
    n_heads=st.integers(1, 4),
    n_layers=st.integers(1, 2),
    n_vocab=st.integers(1, 300),
    n_programs=st.integers(1, 20),
    groups=st.sampled_from([4, 8, 16, 32]),
    n_past=st.integers(0, 100),
    start=st.integers(0, 40),
    n_spare=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_random_arguments(
    n_heads: int,
    n_layers: int,
    n_vocab: int,
    n_programs: int,
    groups: int,
    n_past: int,
    start: int,
    n_spare: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    config = small_config(64 * n_heads, n_layer=n_layers, vocab_size=n_vocab + 1)
    with tuned(n_programs, SHIPPED._replace(groups=groups)):
        check(make_model(config, dtype), n_past, start=start, n_spare=n_spare, seed=seed, slack=8)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_activations_keep_twice_the_bits(dtype: torch.dtype) -> None:
    """Where nothing is rounded into the cache and read from there, products err far less than eager's."""
    model: Any = make_model(small_config(n_layer=1), dtype)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
    token = token_ids(1, 1, model.config.vocab_size).to(DEVICE)
    with tuned(5), torch.inference_mode():
        cache, _ = read_prompt(model, token[:, :0], 1)
        logits = decode(make_decoder(model), cache, int(token), 0, 0)
        eager, truth = (m(token).logits[:, -1] for m in (model, copy.deepcopy(model).double()))
    assert max_error(logits, truth) < 0.03 * max_error(eager, truth)
