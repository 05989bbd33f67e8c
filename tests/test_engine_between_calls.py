"""Calls of `generate()` do not disturb the calls that follow: modes, faults, and what the engine keeps between them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import DEVICE
from models import pair, tiny_config, token_ids
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import fastgpt
from fastgpt import engine
from fastgpt.engine import workspace

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
    owner, name = (workspace.Workspace, "decode") if backend == "triton" else (engine.generation, "decode_one_token")
    step = getattr(owner, name)

    def fail(*args: Any) -> Any:
        step(*args)
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(type(fault)):
            ours.generate(prompt(), **GREEDY)
    assert ours not in workspace._kept
    check()


def test_nothing_is_kept_of_an_abandoned_stream(checked) -> None:
    ours, check = checked
    check()
    stream = ours.stream(prompt(), **GREEDY)
    next(stream)
    check()  # while the other is suspended, with memory of its own
    kept = workspace._kept.get(ours)
    next(stream)
    stream.close()
    assert workspace._kept.get(ours) is kept
    check()
