"""Calls of `generate()` do not disturb the calls that follow: modes, faults, and what the engine keeps between them."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from fastgpt_kernels.operations.persistent_decode import tiles as persistent_decode_tiles
from interpreter import DEVICE, INTERPRETING
from models import pair, tiny_config, token_ids
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import fastgpt
from fastgpt import generate as engine
from fastgpt.generate import device_loop, host_loop, kept, products, workspace
from fastgpt.generate.decoding import KVCache, prefill

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}


@pytest.fixture(autouse=True, params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastgpt.backend(request.param):
        yield request.param


def small_pair(**changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) on the device of the kernels."""
    theirs, ours = pair(tiny_config(**{"n_embd": 64, "n_head": 2, "n_layer": 1, "n_positions": 64} | changes))
    return theirs.to(DEVICE), ours.to(DEVICE)


def prompt(n_rows: int = 1) -> Tensor:
    return token_ids(n_rows, 5, 131).to(DEVICE)


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


# --- weights that change between calls ------------------------------------------------------------------------------


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


def resized(model: Any) -> Any:
    model.resize_token_embeddings(140, mean_resizing=False)
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


def assert_tokens_of_transformers(model: Any, **options: Any) -> list[list[int]]:
    theirs: Any = transformers.GPT2LMHeadModel(copy.deepcopy(model.config))
    theirs.to(DEVICE, model.dtype).eval()
    theirs.load_state_dict(model.state_dict())
    found = model.generate(prompt(), **GREEDY, **options).tolist()
    assert found == theirs.generate(prompt(), **GREEDY).tolist()
    return found


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("tier", ["auto", "persistent"])
def test_weights_changed_between_calls(
    change: Callable[[Any], Any], tier: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tier == "persistent" and backend == "torch":
        pytest.skip("the persistent kernel is one of triton")
    if INTERPRETING:  # where programs run one after the other, and would wait for each other
        monkeypatch.setattr(persistent_decode_tiles, "persistent_programs", lambda _: 1)
    _, ours = small_pair(n_embd=128)
    with engine.tier(tier):
        before = assert_tokens_of_transformers(ours)
        ours = change(ours)
        assert assert_tokens_of_transformers(ours) != before, "the change is too small to be seen"


def test_packed_copies_are_those_of_the_first_token(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.skip("only the path for CPUs copies")
    monkeypatch.setattr(products, "MIN_STEPS", 1)
    monkeypatch.setattr(products, "fastest", lambda known, n_steps: list(known)[-1])
    _, ours = small_pair()
    assert list(products.ways(ours.lm_head.weight, 1))[-1] == "packed"
    for change in (in_place, data_in_place, optimized_fused):
        stream = ours.stream(prompt(), **GREEDY)
        change(ours)
        assert torch.stack(list(stream), 1).tolist() == ours.generate(prompt(), **GREEDY)[:, 5:].tolist()


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

    class Moves(Fails):
        def put(self, value: Tensor) -> None:
            data_swapped(ours)

    with pytest.raises(RuntimeError, match="moved or replaced between two tokens"):
        ours.generate(prompt(), **GREEDY, streamer=Moves(ValueError()))


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


def test_packed_weights_count_in_the_limit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        pytest.skip("only kernels keep anything")
    if INTERPRETING:
        monkeypatch.setattr(persistent_decode_tiles, "persistent_programs", lambda _: 1)
    _, ours = small_pair(n_embd=128)
    with engine.tier("persistent"):
        ours.generate(prompt(), **GREEDY)
        (work,) = kept.workspaces(ours)
        n_bytes = work.cache.memory.nbytes
        assert work.n_bytes > n_bytes + 12 * 128 * 128 * 4
        monkeypatch.setattr(kept, "limit_bytes", lambda device: n_bytes)
        ours.generate(prompt(), **GREEDY)
        assert not kept.workspaces(ours)
