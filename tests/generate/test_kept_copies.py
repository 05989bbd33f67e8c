"""Copies of matrices for products on a CPU serve a model's next call, unless a bit of the matrix is another one."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chosen_products import prefer
from models import pair, tiny_config, token_ids
from small_models import prompt, small_pair
from test_engine_weights import CHANGES, tokens_of_transformers

import fastgpt
from fastgpt.generate import bags, copies, decoding, implementations, products

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
# Prints by how many times the size of its copies a process grows that packs a model's matrices.
PACKS = """
import fastgpt, psutil
from fastgpt.generate import products, view_weights
from transformers import GPT2Config

def resident():
    return psutil.Process().memory_info().rss

weights = view_weights(fastgpt.GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=512, n_head=8, vocab_size=1000)).eval())
products._choose = lambda *_: "packed"
before = resident()
packed = products.Products(weights, n_rows=1, n_steps=99)
print((resident() - before) / packed.n_bytes)
"""

pytestmark = [
    pytest.mark.usefixtures("in_torch"),
    pytest.mark.skipif(not implementations.packs(torch.float32), reason="this torch has no oneDNN"),
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Short calls copy too, into oneDNN's layout. Every copy of a large matrix that is made appears here."""
    monkeypatch.setattr(products, "MIN_STEPS", 1)
    prefer("packed", monkeypatch)
    return counted(implementations, "Packed", monkeypatch)


def counted(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    class Counted(getattr(module, name)):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr(module, name, Counted)
    return made


def n_made(made: list[Any], call: Callable[[], Any]) -> int:
    before = len(made)
    call()
    return len(made) - before


def test_the_next_call_makes_no_copy(made: list[Any]) -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(1, 5, 131)
    expected = theirs.generate(ids, **GREEDY)
    n_matrices = 4 * ours.config.n_layer + 1
    for n_expected in (n_matrices, 0, 0):
        tokens: list[Any] = []
        assert n_made(made, lambda tokens=tokens: tokens.append(ours.generate(ids, **GREEDY))) == n_expected
        assert torch.equal(tokens[0], expected)
    rows = token_ids(3, 5, 131)
    assert n_made(made, lambda: ours.generate(rows, **GREEDY)) == n_matrices
    assert n_made(made, lambda: ours.generate(rows, **GREEDY)) == 0


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_copies_of_changed_weights_are_made_again(change: Callable[[Any], Any], made: list[Any]) -> None:
    _, ours = small_pair(n_embd=128)
    before = ours.generate(prompt(), **GREEDY)
    ours = change(ours)
    expected = tokens_of_transformers(ours)
    assert not torch.equal(expected, before), "the change is too small to be seen"
    assert torch.equal(ours.generate(prompt(), **GREEDY), expected)


@torch.no_grad()
@pytest.mark.skipif(not bags.adds_bytes(), reason="this torch has no bags of bytes")
@pytest.mark.parametrize("name", ["digit", "scale", "zero"])
def test_one_other_bit_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MIN_STEPS", 1)
    prefer("bags", monkeypatch)
    made = counted(implementations, "Bags", monkeypatch)
    ours = fastgpt.quantize(pair(tiny_config())[1])
    call = lambda: ours.generate(token_ids(1, 5, 131), **GREEDY)  # noqa: E731
    product = ours.transformer.h[1].mlp.c_fc
    values, scale = product.matrix
    assert n_made(made, call) == 4 * ours.config.n_layer
    if name == "digit":
        values.data[3, 5] ^= 1
    elif name == "scale":
        scale.data[2] = scale[2].nextafter(torch.tensor(torch.inf))
    else:
        scale.data[2] = 0.0
        assert n_made(made, call) == 1
        scale.data[2] = -0.0
    assert n_made(made, call) == 1
    assert n_made(made, call) == 0


def packed(matrix: Any) -> implementations.Packed:
    return implementations.Packed(matrix, 1)


@torch.no_grad()
def test_weights_that_are_nan_are_kept_too(made: list[Any]) -> None:
    _, ours = pair(tiny_config())
    ours.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    store = copies.Copies(ours)
    matrix, how = ours.transformer.h[0].mlp.c_fc.weight, "packed"
    first = store.prepared(matrix, how, packed)
    store.keep()
    assert copies.Copies(ours).prepared(matrix, how, packed) is first


@pytest.mark.parametrize("end", ["release", "move", "delete"])
def test_copies_are_freed(end: str, made: list[Any]) -> None:
    _, ours = pair(tiny_config())
    ours.generate(token_ids(1, 5, 131), **GREEDY)
    gc.collect()
    assert any(copy() is not None for copy in made)
    if end == "release":
        fastgpt.release(ours)
    elif end == "move":
        ours.to(torch.float64)
    else:
        del ours
    gc.collect()
    assert all(copy() is None for copy in made)


def test_no_more_is_kept_than_the_limit(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(tiny_config())
    ids = token_ids(1, 5, 131)
    ours.generate(ids, **GREEDY)
    (kept,) = [kept for model, kept in copies._kept.items() if model is ours]
    sizes = [copy.n_bytes for copy in kept.values()]
    weights = decoding.view_weights(ours)
    matrices = [matrix for same in products._by_kind(weights) for matrix in same]
    assert sizes == [2 * 4 * matrix.shape.numel() for matrix in matrices]  # type: ignore[union-attr]
    for n_kept in (0, 2, len(sizes)):
        fastgpt.release(ours)
        monkeypatch.setattr(copies, "limit_bytes", lambda n_kept=n_kept: sum(sizes[:n_kept]))
        ours.generate(ids, **GREEDY)
        assert n_made(made, lambda: ours.generate(ids, **GREEDY)) == len(sizes) - n_kept


def test_little_is_kept_where_little_memory_is_free(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices as they were, without which a copy is of no use later, take at most a quarter of it."""
    _, ours = pair(tiny_config())
    weights, ids = decoding.view_weights(ours), token_ids(1, 5, 131)
    sizes = [4 * matrix.shape.numel() for same in products._by_kind(weights) for matrix in same]
    for n_kept in (0, 2, len(sizes)):
        fastgpt.release(ours)
        monkeypatch.setattr(copies, "available_memory", lambda n_kept=n_kept: 4 * sum(sizes[:n_kept]))
        assert n_made(made, lambda: ours.generate(ids, **GREEDY)) == len(sizes)
        assert n_made(made, lambda: ours.generate(ids, **GREEDY)) == len(sizes) - n_kept


@pytest.mark.skipif(copies._malloc_trim() is None, reason="not glibc")
def test_bug_making_copies_took_their_memory_twice() -> None:
    """Each left a gap of its size. In a new process, because the memory of this one has gaps already."""
    finished = subprocess.run([sys.executable, "-c", PACKS], capture_output=True, text=True, check=True)
    assert float(finished.stdout) < 1.3


def test_nothing_is_kept_of_weights_that_one_call_converts(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "is_slow", lambda dtype: dtype == torch.bfloat16)
    ours = pair(tiny_config())[1].bfloat16()
    ours.generate(token_ids(1, 5, 131), **GREEDY)
    assert made
    assert ours not in copies._kept
    gc.collect()
    assert all(copy() is None for copy in made)


def test_a_call_without_copies_leaves_those_before_it(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(tiny_config())
    ids = token_ids(1, 5, 131)
    ours.generate(ids, **GREEDY)
    ours.generate(ids, **GREEDY | {"max_new_tokens": 1})
    assert n_made(made, lambda: ours.generate(ids, **GREEDY)) == 0


def test_of_a_copy_that_is_kept_a_call_counts_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first call too: which implementation is taken, and so every bit, does not depend on the calls before."""
    known = {"as stored": products.Cost(0.0, 1.0, copies=False), "packed": products.Cost(20.0, 0.5, copies=True)}
    monkeypatch.setattr(products, "costs", lambda *_: known)
    _, ours = pair(tiny_config())
    weights = decoding.view_weights(ours)
    for kept, expected in ((ours, "packed"), (ours, "packed"), (None, "as stored")):
        chosen = products.Products(weights, 1, 16, copies=copies.Copies(kept)).chosen
        assert set(chosen.values()) == {expected}
    monkeypatch.setattr(copies, "limit_bytes", lambda: 0)
    assert set(products.Products(weights, 1, 16, copies=copies.Copies(ours)).chosen.values()) == {"as stored"}


def test_each_part_of_the_head_has_left_the_caches_when_it_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.randn(8 * 50 + 3, 16).t()
    read: list[int] = []

    class Noted(implementations.AsStored):
        def __call__(self, x: Any, bias: Any) -> Any:
            read.append((self.matrix.data_ptr() - head.data_ptr()) // (4 * 16 * 51))
            return super().__call__(x, bias)

    monkeypatch.setattr(products, "implementations_of", lambda *_: dict.fromkeys(("one", "two", "three"), Noted))
    products._measure([head], 1, None)
    assert set(read) == set(range(7))
    timed = read[3:]  # after each product was looked at
    for index in range(6, len(timed)):
        assert timed[index] not in timed[index - 6 : index]
