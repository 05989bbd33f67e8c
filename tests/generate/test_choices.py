"""The choice after a decode step is recorded once for each set of options, and replayed on the same memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastgpt_kernels.operations.sampling import op as sampling_op
from interpreter import DEVICE
from models import pair, tiny_config, token_ids
from torch import Tensor

import fastgpt
from fastgpt.generate import kept, workspace
from fastgpt.generate.streams import OwnStream

pytestmark = pytest.mark.usefixtures("on_kernels")

PROMPTS = token_ids(2, 5, 131)
BASE = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
CALLS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 4},  # the seed is no part of a graph
    {"do_sample": True, "seed": 4, "temperature": 1.7},
    {"do_sample": True, "seed": 4, "top_k": 7},
    {"do_sample": False, "eos_token_id": 96},
    {"do_sample": False, "eos_token_id": [12, 66]},
    {"do_sample": False, "repetition_penalty": 1.4},
    {"do_sample": True, "seed": 5},
]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose decode steps look their logits up by token, which is quick."""
    _, ours = pair(tiny_config(n_layer=1))
    table = torch.randn(131, 131, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def launch(self: workspace.Workspace, model: Any, n_new: int) -> None:
        self._steps[n_new] = object()
        self.logits.copy_(table[self.tokens])

    monkeypatch.setattr(workspace.Workspace, "_launch", launch)
    return ours.to(DEVICE)


def generate(model: Any, call: dict[str, Any]) -> list[list[int]]:
    ids = PROMPTS.to(DEVICE)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **BASE | {"top_k": 0} | call).tolist()


class Recorder:
    """Stands in for CUDA graphs: a replay does the recorded work again, if that is still what the caller wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.n_records = 0
        self.state: list[Tensor] = []
        self.arguments: Any = None
        sample = sampling_op.sample

        def note(logits: Tensor, rows: Any, options: Any, eos_ids: Tensor | None, pad_id: int) -> None:
            seed = None if options.seed is None else options.seed.data_ptr()
            addresses = [None if x is None else x.data_ptr() for x in (logits, *rows)]
            ends = None if eos_ids is None else eos_ids.tolist()
            self.arguments = addresses, replace(options, seed=None), seed, ends, pad_id
            sample(logits, rows, options, eos_ids, pad_id)

        def record(own: OwnStream, work: Callable[[], None]) -> Callable[[], None]:
            self.n_records += 1
            state, self.arguments = [x.clone() for x in self.state], None
            work()
            recorded = self.arguments
            for x, before in zip(self.state, state, strict=True):
                x.copy_(before)  # recording does none of the work

            def replay() -> None:
                self.arguments = None
                work()
                assert self.arguments == recorded

            return replay

        monkeypatch.setattr(sampling_op, "sample", note)
        monkeypatch.setattr(OwnStream, "can_record", property(lambda own: True))
        monkeypatch.setattr(OwnStream, "record", record)
        begin = workspace.Choices.begin

        def begin_and_note(self_: workspace.Choices, *arguments: Any, **options: Any) -> None:
            begin(self_, *arguments, **options)
            self.state = [x for x in self_.rows if x is not None]

        monkeypatch.setattr(workspace.Choices, "begin", begin_and_note)


def test_a_mixed_sequence_of_calls_records_each_choice_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = []
    for call in CALLS:
        fastgpt.release(model)
        expected.append(generate(model, call))
    assert len({str(tokens) for tokens in expected}) >= 6
    fastgpt.release(model)

    recorder = Recorder(monkeypatch)
    order = [*range(len(CALLS)), *reversed(range(len(CALLS))), 0, 5, 1]
    for number in order:
        assert generate(model, CALLS[number]) == expected[number], CALLS[number]
    # One of the prompt and one of the step; of the choices, those with another seed share theirs.
    assert recorder.n_records == 2 + len(CALLS) - 2


def test_the_choices_asked_for_last_are_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(workspace, "_KEPT_GRAPHS", 2)
    for number in (0, 3, 4, 4, 3, 0):
        generate(model, CALLS[number])
    assert len(kept.workspaces(model)[-1].choices._replays) == 2
    assert recorder.n_records == 2 + 4


def test_what_a_call_returns_is_not_overwritten_by_the_next(model: Any) -> None:
    ids = PROMPTS.to(DEVICE)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **BASE)
    before = first.clone()
    generate(model, CALLS[1])
    assert torch.equal(first, before)
