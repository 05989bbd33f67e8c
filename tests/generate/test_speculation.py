"""Prompt lookup changes how many forwards there are, and no token."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import pair, tiny_config, token_ids
from torch import Tensor

from fastgpt import generate as engine
from fastgpt.generate.lookup import NGramIndex
from fastgpt.model.compat import CACHE

GREEDY = {"do_sample": False, "eos_token_id": None}


# --- proposals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 1, 2], [3, 1, 2, 3]),  # and on from the start of the proposal
        ([1, 2, 8, 5, 2, 9, 1, 2], [8, 5, 2, 9]),  # two tokens that are known say more than one
        ([1, 2, 8, 7, 1, 2, 9, 0, 1, 2], [9, 0, 1, 2]),  # the last time counts
        ([4, 4], [4, 4, 4, 4]),
        ([1, 2, 3], []),
        ([7], []),
    ],
)
def test_what_followed_the_newest_tokens_is_proposed(tokens: list[int], expected: list[int]) -> None:
    index = NGramIndex(n_longest=3)
    index.extend(tokens)
    assert index.propose(4) == expected
    assert index.propose(2) == expected[:2]
    assert index.propose(0) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 9))
def test_proposals_equal_a_search(tokens: list[int], n_longest: int, n_most: int) -> None:
    index = NGramIndex(n_longest)
    for token in tokens:
        index.extend([token])
    expected: list[int] = []
    for length in range(1, min(n_longest, len(tokens)) + 1):
        for start in range(length, len(tokens)):
            if tokens[start - length : start] == tokens[-length:]:
                expected = [*tokens[start:], *(n_most * tokens[start:])][:n_most]
    assert index.propose(n_most) == expected


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """How many tokens went into each forward of the engine behind its prompts."""
    sizes, decode = [], engine.decode_tokens

    def counted(weights: Any, cache: Any, tokens: Tensor, *rest: Any) -> Tensor:
        sizes.append(tokens.shape[1])
        return decode(weights, cache, tokens, *rest)

    monkeypatch.setattr(engine.lookup, "decode_tokens", counted)
    return sizes


def repeating(n_tokens: int = 24) -> Tensor:
    """(1, T) ids with a period of 6."""
    return token_ids(1, 6, 131).repeat(1, -(-n_tokens // 6))[:, :n_tokens]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_matching_ngram_size": 1},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 30, "eos_token_id": list(range(0, 131, 3))},
        {"eos_token_id": list(range(0, 131, 7))},
        {"do_sample": True, "top_k": 3},
        {"do_sample": True, "seed": 5, "temperature": 0.3},
        {"attention_mask": torch.tensor([[0] * 5 + [1] * 19])},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_proposed", [1, 4, 50])
def test_tokens_are_those_without_lookup(options: dict, n_proposed: int, forwards: list[int]) -> None:
    """From the same torch.manual_seed where they sample."""
    _, ours = pair(tiny_config(n_positions=128))
    options = GREEDY | {"max_new_tokens": 90} | options
    torch.manual_seed(1)
    expected = ours.generate(repeating(), **options)
    torch.manual_seed(1)
    looked_up = ours.generate(repeating(), prompt_lookup_num_tokens=n_proposed, **options)
    assert looked_up.tolist() == expected.tolist()
    assert 1 < max(forwards) <= 1 + n_proposed


def test_tokens_equal_transformers(caplog) -> None:
    caplog.set_level(logging.DEBUG, logger="fastgpt")
    theirs, ours = pair(tiny_config(n_positions=128))
    options = GREEDY | {"max_new_tokens": 100, "prompt_lookup_num_tokens": 5}
    assert ours.generate(repeating(), **options).tolist() == theirs.generate(repeating(), **options).tolist()
    assert [record.getMessage() for record in caplog.records] == ["generate: the engine"]


def test_lookup_that_the_engine_does_not_run_draws_as_in_transformers(forwards: list[int]) -> None:
    """Other tokens than without lookup under the same seed, and those of transformers' lookup."""
    theirs, ours = pair(tiny_config(n_positions=128))
    options = {"do_sample": True, "typical_p": 0.9, "max_new_tokens": 60, "eos_token_id": None}

    def drawn(model: Any, **more: Any) -> list[list[int]]:
        torch.manual_seed(2)
        return model.generate(repeating(), **options, **more).tolist()

    looked_up = drawn(ours, prompt_lookup_num_tokens=4)
    assert looked_up == drawn(theirs, prompt_lookup_num_tokens=4)
    assert looked_up != drawn(ours) == drawn(theirs)
    assert forwards == []


def test_text_that_repeats_takes_fewer_forwards(forwards: list[int]) -> None:
    _, ours = pair(tiny_config(n_positions=128))
    with torch.no_grad():
        for block in ours.transformer.h:  # what follows a token is then decided by the token alone
            block.attn.c_proj.weight.zero_()
        ours.transformer.wpe.weight.zero_()
    sequence = ours.generate(repeating(), prompt_lookup_num_tokens=8, max_new_tokens=100, **GREEDY)
    assert sequence.shape == (1, 124)
    assert len(forwards) < 40


def test_the_context_is_filled_to_its_last_token() -> None:
    _, ours = pair(tiny_config())
    options = GREEDY | {"prompt_lookup_num_tokens": 7}
    assert ours.generate(repeating(), max_new_tokens=25, **options).shape == (1, 49)
    with pytest.raises(ValueError, match="position 48 is outside the context"):
        ours.generate(repeating(), max_new_tokens=26, **options)


def test_cache_of_the_result_holds_what_was_accepted() -> None:
    _, ours = pair(tiny_config(n_positions=128))
    options = GREEDY | {"max_new_tokens": 40, "return_dict_in_generate": True}
    plain, looked_up = (ours.generate(repeating(), **options, **more) for more in ({}, {"prompt_lookup_num_tokens": 6}))
    for ours_of_layer, expected in zip(looked_up[CACHE].layers, plain[CACHE].layers, strict=True):
        torch.testing.assert_close(ours_of_layer.keys, expected.keys)
        torch.testing.assert_close(ours_of_layer.values, expected.values)


def test_a_seed_also_holds_with_a_draft_model() -> None:
    theirs, ours = pair(tiny_config(n_positions=96))
    options = {"max_new_tokens": 30, "do_sample": True, "eos_token_id": None, "seed": 4}
    ids = token_ids(1, 8, 131)
    assert ours.generate(ids, assistant_model=theirs, **options).tolist() == ours.generate(ids, **options).tolist()


def test_wrong_lookups_end_in_one_line() -> None:
    _, ours = pair(tiny_config())
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
        with pytest.raises(ValueError, match=f"^{name} must be 1 or more, not 0$"):
            ours.generate(repeating(8), **{"prompt_lookup_num_tokens": 3, name: 0, "max_new_tokens": 2})
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        ours.generate(token_ids(2, 8, 131), prompt_lookup_num_tokens=3, max_new_tokens=2)
