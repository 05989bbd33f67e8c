"""Generation on each backend, and the engine's log, which says where a call went."""

import logging
from collections.abc import Iterator
from typing import Any

import fastgpt_kernels
import pytest
import torch
from fastgpt_kernels.operations.decode_step import reference as decode_step
from fastgpt_kernels.operations.sampling import reference as sampling
from models import pair, tiny_config

import fastgpt
from fastgpt.generate import lookup, workspace
from fastgpt.generate.streams import OwnStream


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastgpt.backend(request.param):
        yield request.param


@pytest.fixture
def in_torch() -> Iterator[None]:
    """A GPU's own products are not these."""
    with fastgpt.backend("torch"):
        yield


@pytest.fixture
def on_kernels() -> Iterator[None]:
    with fastgpt.backend("triton"):
        yield


@pytest.fixture
def route(caplog) -> Any:
    """A function that says where the calls since its last use went."""
    caplog.set_level(logging.DEBUG, logger="fastgpt")

    def messages() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "fastgpt"]
        caplog.clear()
        return found

    return messages


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(transformers' model, ours), generating as on a GPU, but with references for kernels; a replay works again."""

    def launch(self: workspace.Workspace, weights: Any, n_new: int) -> None:
        self._steps[n_new] = object()
        memory, (tokens, positions, slots, starts) = self.cache.memory, self.state[:, : self.n_rows * n_new, None]
        hidden = torch.arange(self.n_slots) < starts[: self.n_rows]
        bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
        ids = tokens.view(-1, n_new), positions.view(-1, n_new)
        logits = decode_step.decode_tokens(weights, memory, int(slots[0]), *ids, bias)
        self.logits[: len(tokens)] = logits.flatten(0, 1)

    for owner, name, stub in (
        (OwnStream, "can_record", property(lambda own: True)),
        (OwnStream, "record", lambda own, work: work),
        (workspace.Workspace, "_launch", launch),
        (workspace, "sample", sampling.sample),
        (lookup, "sample", sampling.sample),
        (fastgpt_kernels, "kernel", lambda name: getattr(fastgpt_kernels.reference, name)),
    ):
        monkeypatch.setattr(owner, name, stub)
    with fastgpt.backend("triton"):
        yield pair(tiny_config())
