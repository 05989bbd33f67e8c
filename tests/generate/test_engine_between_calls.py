"""Calls of `generate()` do not disturb the calls that follow: modes, faults, and what the engine keeps between them."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import DEVICE
from small_models import let_persistent_run, prompt, small_pair
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import fastgpt
from fastgpt import generate as engine
from fastgpt.generate import device_loop, host_loop, kept, workspace
from fastgpt.generate.decoding import KVCache, prefill

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def checked() -> Any:
    """(ours, a function that holds its tokens against those of transformers' model)."""
    theirs, ours = small_pair()
    expected = theirs.generate(prompt(), **GREEDY).tolist()

    def check() -> None:
        assert ours.generate(prompt(), **GREEDY).tolist() == expected

    return ours, check


# --- inference mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 3}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}], ids=str
)
def test_calls_inside_and_outside_inference_mode_follow_each_other(options: dict[str, Any]) -> None:
    _, ours = small_pair()
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    expected = ours.generate(prompt(), **GREEDY, **options).tolist()
    for mode in (True, False, True, True, False):
        with torch.inference_mode(mode):
            assert ours.generate(prompt(), **GREEDY, **options).tolist() == expected


def test_a_stream_begun_in_inference_mode_goes_on_outside() -> None:
    _, ours = small_pair()
    expected = ours.generate(prompt(), **GREEDY)[:, 5:]
    with torch.inference_mode():
        stream = ours.stream(prompt(), **GREEDY)
        tokens = [next(stream)]
    tokens.extend(stream)
    assert torch.stack(tokens, 1).tolist() == expected.tolist()
    assert not torch.is_inference_mode_enabled()


def test_results_of_inference_mode_are_ordinary_tensors() -> None:
    _, ours = small_pair()
    with torch.inference_mode():
        result = ours.generate(prompt(), **GREEDY, return_dict_in_generate=True)
        streamed = list(ours.stream(prompt(), **GREEDY))
    for x in (result.sequences, result.past_key_values.layers[0].keys, *streamed):
        x.add_(1)  # raises for a tensor of inference mode


# --- calls that do not come to their end ----------------------------------------------------------------------------


class Fails(BaseStreamer):
    def __init__(self, fault: BaseException):
        self.fault, self.n_tokens = fault, 0

    def put(self, value: Tensor) -> None:
        self.n_tokens += value.numel()
        if self.n_tokens > 6:
            raise self.fault

    def end(self) -> None: ...


@pytest.mark.parametrize("fault", [RuntimeError("broken pipe"), KeyboardInterrupt()], ids=repr)
def test_a_call_after_a_fault(checked, fault: BaseException) -> None:
    ours, check = checked
    check()
    with pytest.raises(type(fault)):
        ours.generate(prompt(), **GREEDY, streamer=Fails(fault))
    check()


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_nothing_is_kept_of_a_call_that_failed_in_a_step(
    checked, backend: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, check = checked
    check()
    owner, name = (workspace.Workspace, "decode") if backend == "triton" else (engine.host_loop, "decode_one_token")
    step = getattr(owner, name)

    def fail(*args: Any) -> Any:
        step(*args)
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(type(fault)):
            ours.generate(prompt(), **GREEDY)
    assert not kept.workspaces(ours)
    check()


def test_memory_that_runs_out_in_a_prefill_is_returned(checked, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what was asked for, nothing of the call stays allocated, and the next call is right."""
    ours, check = checked
    check()
    caches: list[weakref.ref] = []
    allocate, loop = KVCache.allocate, device_loop if backend == "triton" else host_loop

    def noted(*args: Any) -> KVCache:
        cache = allocate(*args)
        caches.append(weakref.ref(cache))
        return cache

    def fail(*args: Any) -> Any:
        prefill(*args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(KVCache, "allocate", noted)
        patched.setattr(loop, "prefill", fail)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 7\.00 GiB"):
            ours.generate(prompt(3), **GREEDY)
    gc.collect()
    assert caches
    assert [cache() for cache in caches] == [None] * len(caches)
    assert not kept.workspaces(ours)
    check()


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_prefill_takes_the_memory_that_is_kept(
    checked, backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, check = checked
    check()
    expected = ours.generate(prompt(), **GREEDY, **options).tolist()
    _, other = small_pair()
    other.generate(prompt(), **GREEDY)
    if backend == "torch":
        assert not kept.workspaces(other)
        return

    def full(*args: Any) -> Any:
        if kept.workspaces(other):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(*args)

    monkeypatch.setattr(device_loop, "prefill", full)
    assert ours.generate(prompt(), **GREEDY, **options).tolist() == expected
    assert not kept.workspaces(other)


def test_nothing_is_kept_of_an_abandoned_stream(checked) -> None:
    ours, check = checked
    check()
    stream = ours.stream(prompt(), **GREEDY)
    next(stream)
    check()  # while the other is suspended, with memory of its own
    works = kept.workspaces(ours)
    next(stream)
    stream.close()
    assert kept.workspaces(ours) == works
    check()


# --- what belongs to whom -------------------------------------------------------------------------------------------


def test_streamed_tokens_are_the_callers_own() -> None:
    _, ours = small_pair()
    expected = ours.generate(prompt(), **GREEDY)[:, 5:].tolist()
    found = []
    for tokens in ours.stream(prompt(), **GREEDY):
        assert not tokens.is_pinned()
        found.append(int(tokens))
        tokens.fill_(-7)
    assert [found] == expected


@pytest.mark.parametrize(
    "move",
    [
        fastgpt.release,
        lambda model: fastgpt.release(nn.Sequential(model)),
        lambda model: model.to(DEVICE),
        lambda model: nn.Sequential(model).to(DEVICE),
        lambda model: model.float(),
    ],
)
def test_release_and_moves_free_what_is_kept(checked, backend: str, move: Callable[[Any], Any]) -> None:
    ours, check = checked
    check()
    works = [weakref.ref(work) for work in kept.workspaces(ours)]
    assert len(works) == (backend == "triton")
    move(ours)
    gc.collect()
    assert not kept.workspaces(ours)
    assert [work for work in works if work() is not None] == []
    check()


def test_release_leaves_a_model_that_keeps_nothing_alone() -> None:
    fastgpt.release(nn.Linear(2, 2))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # only kernels keep anything
def test_packed_weights_count_in_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    let_persistent_run(monkeypatch)
    _, ours = small_pair(n_embd=128)
    with engine.tier("persistent"):
        ours.generate(prompt(), **GREEDY)
        (work,) = kept.workspaces(ours)
        n_bytes = work.cache.memory.nbytes
        assert work.n_bytes > n_bytes + 12 * 128 * 128 * 4
        monkeypatch.setattr(kept, "limit_bytes", lambda device: n_bytes)
        ours.generate(prompt(), **GREEDY)
        assert not kept.workspaces(ours)
