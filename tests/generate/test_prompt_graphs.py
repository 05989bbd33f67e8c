"""Prompts in CUDA graphs: a tape of torch's operations stands in for a graph, and repeats them on the same memory."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from models import pair, tiny_config, token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgpt
from fastgpt.generate import kept, prompt_graphs, workspace
from fastgpt.generate.decoding import KVCache, prefill, without_autograd
from fastgpt.generate.prompt_graphs import PromptGraphs, hides_its_launches, padded_length
from fastgpt.generate.streams import OwnStream

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Tape(TorchDispatchMode):
    """Notes torch's operations with the tensors and numbers that they were given, which a replay gives them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        assert "_local_scalar_dense" not in str(func), "reads a value on the host, which no capture allows"
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def n_recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The number of tapes so far. Nothing that a recording computes may be used."""
    tapes: list[Tape] = []

    def record(own: OwnStream, work: Callable[[], None]) -> Callable[[], None]:
        with Tape() as tape:
            work()
        tapes.append(tape)
        return tape.replay

    monkeypatch.setattr(OwnStream, "record", record)
    return lambda: len(tapes)


def prompts(model: Any, n_rows: int = 1, n_slots: int = 48) -> PromptGraphs:
    cache = KVCache.allocate(model, n_rows, n_slots)
    return PromptGraphs(OwnStream(model.device), cache, torch.empty(n_rows, model.config.vocab_size))


@without_autograd
def check(graphs: PromptGraphs, model: Any, ids: Tensor, positions: Tensor | None = None) -> None:
    """Fill the cache of graphs, and compare it with one that was filled without padding."""
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    expected = KVCache.allocate(model, *ids.shape)
    expected_logits = prefill(model, expected, ids, None, positions)
    cache, logits = graphs._cache, graphs._logits
    cache.memory.fill_(torch.nan)
    logits.fill_(torch.nan)
    assert graphs.fill(model, ids, positions)
    assert cache.n_tokens == ids.shape[1]
    torch.testing.assert_close(cache.memory[..., : cache.n_tokens, :], expected.memory)
    torch.testing.assert_close(logits, expected_logits)


def test_lengths_add_less_than_half() -> None:
    lengths = [padded_length(n, 1024) for n in range(1, 1025)]
    assert sorted(set(lengths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(n <= length < 1.5 * max(n, 11) for n, length in enumerate(lengths, start=1))
    assert [padded_length(n, 20) for n in (3, 17, 20)] == [16, 20, 20]


@pytest.mark.parametrize("n_rows", [1, 3])
def test_prompts_of_one_graph_are_those_without_padding(n_rows: int, n_recorded: Any) -> None:
    _, ours = pair(tiny_config())
    graphs = prompts(ours, n_rows)
    for number, n_tokens in enumerate((20, 24, 17, 23, 18)):
        check(graphs, ours, token_ids(n_rows, n_tokens, 131, seed=number))
    for n_tokens in (5, 48, 16, 1, 33):
        check(graphs, ours, token_ids(n_rows, n_tokens, 131), 3 + torch.arange(n_tokens).expand(n_rows, -1) % 40)
    assert n_recorded() == 3  # 24, 16 and 48


def test_weights_changed_in_place_are_read(n_recorded: Any) -> None:
    _, ours = pair(tiny_config(n_layer=1))
    graphs = prompts(ours)
    for number in range(4):
        check(graphs, ours, token_ids(1, 20 + number, 131))
        with torch.no_grad():
            ours.transformer.h[0].mlp.c_fc.weight.mul_(1.3)
            ours.transformer.wte.weight.data.add_(0.1)
    assert n_recorded() == 1


def test_padding_brings_in_no_token_that_the_prompt_lacks(n_recorded: Any) -> None:
    """Its weights may be NaN, and an attention weight of zero times NaN is NaN."""
    _, ours = pair(tiny_config())
    ids = token_ids(1, 20, 131).clamp(1, 130)
    with torch.no_grad():
        ours.transformer.wte.weight[0] = torch.nan
        ours.transformer.wpe.weight[20:] = torch.nan
    graphs = prompts(ours)
    graphs._logits = torch.empty(1, 130)
    forward = prompt_graphs.forward_prompt
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:  # The logit of the token itself is NaN.
            patch.setattr(prompt_graphs, "forward_prompt", lambda *args: forward(*args)[:, 1:])
            assert without_autograd(graphs.fill)(ours, ids, torch.arange(20)[None])
        assert graphs._logits.isfinite().all()
        assert graphs._cache.memory[..., :24, :].isfinite().all()
        graphs._cache.memory.fill_(torch.nan)


def test_an_id_outside_the_vocabulary_is_refused(n_recorded: Any) -> None:
    _, ours = pair(tiny_config(n_layer=1))
    graphs = prompts(ours)
    for _ in range(3):
        with pytest.raises(ValueError, match="token id 131 is outside the vocabulary"):
            graphs.fill(ours, torch.full((1, 5), 131), torch.arange(5)[None])
        check(graphs, ours, token_ids(1, 5, 131))


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "n_head", "dtype", "expected"),
    [
        (12, 768, 12, torch.bfloat16, [4 * 2048, 6 * 2048]),
        (48, 1600, 25, torch.bfloat16, [2048, 2560]),
        (12, 768, 12, torch.float32, [1024, 1280]),
    ],
)
def test_a_gpu_that_computes_longer_than_the_host_launches_needs_no_graph(
    n_layer: int, n_embd: int, n_head: int, dtype: torch.dtype, expected: list[int]
) -> None:
    """expected: tokens with a graph, and without."""
    shape = n_layer, 2, 2, n_head, 1024, n_embd // n_head
    memory = torch.empty(shape, dtype=dtype, device="meta")
    assert [hides_its_launches(memory, n // 2) for n in expected] == [False, True]


# --- in generate() --------------------------------------------------------------------------------------------------


def recorded_lengths(model: Any) -> list[int]:
    (work,) = kept.workspaces(model)
    assert work.prompts is not None
    return [length for length, replay in work.prompts._replays.items() if replay is not None]


def test_generate_gives_the_same_tokens_from_graphs(models: Any) -> None:
    theirs, ours = models
    for n_tokens, hidden in ((20, 0), (18, 0), (22, 4), (24, 0), (5, 0), (30, 30), (16, 0)):
        ids = token_ids(2, n_tokens, 131, seed=n_tokens)
        mask = torch.ones_like(ids)
        mask[0, : hidden // 2] = 0
        options = GREEDY | {"attention_mask": mask, "max_new_tokens": 4}
        assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
    assert recorded_lengths(ours) == [24, 16]


def test_warmup_records_prompts_of_the_length(models: Any) -> None:
    _, ours = models
    fastgpt.warmup(ours, prompt_tokens=20)
    assert recorded_lengths(ours) == [24]


@pytest.mark.parametrize("change", ["a weight lies elsewhere", "products are rounded to tf32", "another backend"])
def test_what_graphs_fix_makes_them_useless_when_it_changes(models: Any, change: str) -> None:
    _, ours = models
    options = GREEDY | {"max_new_tokens": 2}
    ids = token_ids(1, 20, 131)
    for _ in range(2):
        ours.generate(ids, **options)
    assert recorded_lengths(ours) == [24]
    with ExitStack() as patch:
        if change == "a weight lies elsewhere":
            weight = ours.transformer.h[0].mlp.c_fc.weight
            weight.data = weight.data.clone()
        elif change == "products are rounded to tf32":
            torch.set_float32_matmul_precision("high")
            patch.callback(torch.set_float32_matmul_precision, "highest")
        else:
            patch.enter_context(mock.patch.object(workspace.ops, "selected_backend", return_value="auto"))
        ours.generate(ids, **options)
        assert recorded_lengths(ours) == []


def test_prompt_lookup_takes_the_same_graphs(models: Any) -> None:
    theirs, ours = models
    ids = token_ids(1, 4, 131).repeat(1, 5)
    expected = theirs.generate(ids, **GREEDY, max_new_tokens=8).tolist()
    for _ in range(3):
        assert ours.generate(ids, **GREEDY, max_new_tokens=8, prompt_lookup_num_tokens=3).tolist() == expected
    assert recorded_lengths(ours) == [24]
