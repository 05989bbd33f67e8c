"""What is kept between calls on the kernels: workspaces that serve again, within a limit, until the model changes."""

import gc
import weakref
from typing import Any

import pytest
import torch
from interpreter import DEVICE
from models import token_ids
from small_models import small_pair
from torch import nn

import fastgpt
from fastgpt.generate import kept, view_weights, workspace

pytestmark = pytest.mark.usefixtures("on_kernels")

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_a_workspace_serves_again_until_something_changes() -> None:
    theirs, ours = small_pair()
    ids, options = token_ids(1, 5, 131).to(DEVICE), GREEDY | {"max_new_tokens": 4}

    def run() -> workspace.Workspace:
        assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
        return kept.workspaces(ours)[-1]

    first = run()
    assert run() is first
    with torch.no_grad():
        for model in (theirs, ours):
            model.transformer.h[0].mlp.c_fc.weight.neg_()
    assert run() is first, "weights are read where they lie"
    for model in (theirs, ours):
        model.transformer.h[0].attn.c_proj.bias = nn.Parameter(-model.transformer.h[0].attn.c_proj.bias)
    assert run() is not first
    two_rows = token_ids(2, 5, 131).to(DEVICE)
    assert ours.generate(two_rows, **options).tolist() == theirs.generate(two_rows, **options).tolist()
    assert [work.n_rows for work in kept.workspaces(ours)] == [1, 2], "those of other sizes stay"


def test_nothing_of_a_model_outlives_it() -> None:
    _, ours = small_pair()
    ours.generate(token_ids(1, 5, 131).to(DEVICE), **GREEDY, max_new_tokens=3)
    n_kept = len(kept._kept)
    parameters = [weakref.ref(parameter) for parameter in ours.parameters()]
    work = kept.workspaces(ours)[-1]
    del ours
    gc.collect()
    assert len(kept._kept) == n_kept - 1
    assert [p for p in parameters if p() is not None] == [], "the workspace holds weights"
    assert work.cache.memory.isfinite().any()


def test_large_caches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = small_pair()
    monkeypatch.setattr(kept, "limit_bytes", lambda device: 64)
    ours.generate(token_ids(1, 5, 131).to(DEVICE), **GREEDY, max_new_tokens=3)
    assert not kept.workspaces(ours)


def test_the_limit_drops_what_was_used_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = small_pair()
    options = GREEDY | {"max_new_tokens": 3}
    for n_rows in (1, 2, 1, 3):
        ours.generate(token_ids(n_rows, 5, 131).to(DEVICE), **options)
    assert [work.n_rows for work in kept.workspaces(ours)] == [2, 1, 3]
    n_bytes = sum(work.n_bytes for work in kept.workspaces(ours))
    monkeypatch.setattr(kept, "limit_bytes", lambda device: n_bytes - 1)
    ours.generate(token_ids(1, 5, 131).to(DEVICE), **options)
    assert [work.n_rows for work in kept.workspaces(ours)] == [3, 1]


def test_memory_that_runs_out_is_taken_from_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs, ours), (_, other) = small_pair(), small_pair()
    options = GREEDY | {"max_new_tokens": 3}
    ids = token_ids(2, 5, 131).to(DEVICE)
    other.generate(ids, **options)

    class Full(workspace.Workspace):
        def __init__(self, *arguments: Any) -> None:
            if kept.workspaces(other):
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(*arguments)

    monkeypatch.setattr(kept, "Workspace", Full)
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
    assert not kept.workspaces(other)


def test_warmup_leaves_nothing_to_compile_or_allocate() -> None:
    theirs, ours = small_pair()
    fastgpt.warmup(ours, batch=[1, 3], prompt_tokens=6)
    works = set(kept.workspaces(ours))
    assert {work.n_rows for work in works} == {1, 3}
    for n_rows in (3, 1):
        ids, options = token_ids(n_rows, 5, 131).to(DEVICE), GREEDY | {"max_new_tokens": 4}
        assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
    assert set(kept.workspaces(ours)) == works


def test_two_calls_at_once_do_not_share_memory() -> None:
    _, ours = small_pair()
    size = ours, view_weights(ours), 1, 8
    with kept.workspace(*size) as first, kept.workspace(*size) as second:
        assert first.cache.memory.data_ptr() != second.cache.memory.data_ptr()
