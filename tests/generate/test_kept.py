"""Workspaces that are kept serve calls of other sizes too, so that a mixed sequence of calls records little."""

import random
from collections.abc import Callable
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import token_ids

from fastgpt.generate import kept
from fastgpt.generate.streams import OwnStream

WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "top_k": 0, "seed": 1},
    {"do_sample": True, "top_k": 7, "seed": 2},
    {"do_sample": False, "prompt_lookup_num_tokens": 3},
    {"do_sample": False, "prompt_lookup_num_tokens": 8},
]


def test_a_mixed_sequence_of_50_calls_records_little(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the limit has room for the whole context of 4 rows, and not of 8."""
    theirs, ours = models
    n_recorded, n_workspaces = 0, 0
    allocate, record = kept.Workspace, OwnStream.record

    def count(own: OwnStream, work: Any) -> Any:
        nonlocal n_recorded
        n_recorded += 1
        return record(own, work)

    def new(*arguments: Any) -> Any:
        nonlocal n_workspaces
        n_workspaces += 1
        return allocate(*arguments)

    monkeypatch.setattr(OwnStream, "record", count)
    monkeypatch.setattr(kept, "Workspace", new)
    monkeypatch.setattr(kept, "limit_bytes", lambda device: 5 * 48 * 2 * 2 * 2 * 64 * 4)
    drawn = random.Random(0)
    for _ in range(50):
        way = drawn.choice(WAYS)
        n_rows = 1 if "prompt_lookup_num_tokens" in way else drawn.choice([1, 2, 4, 8])
        ids = token_ids(n_rows, drawn.randrange(2, 40), 131, seed=drawn.randrange(99))
        options = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": drawn.randrange(2, 9)} | way
        found = ours.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if not way["do_sample"]:
            del options["do_sample"]
            assert found.tolist() == theirs.generate(ids, do_sample=False, **options).tolist()
    assert n_workspaces <= 15  # 21 with as many slots as a call needs, and one for each number of proposed tokens
    assert n_recorded <= 45


class Held:
    """A workspace whose facts are read slowly: another thread asks for one meanwhile."""

    own_stream = SimpleNamespace(n_bytes=0)

    def __init__(self, meanwhile: Callable[[], None]):
        self.other = Thread(target=meanwhile)

    def _slowly(self) -> int:
        if self.other.ident is None:
            self.other.start()
            self.other.join(0.5)
        return 0

    fixed = n_bytes = property(_slowly)

    def serves(self, *size: int) -> bool:
        return True


@pytest.mark.parametrize("moment", ["while it is looked at", "while another is kept"])
def test_bug_two_threads_took_one_workspace(models: Any, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    _, ours = models
    monkeypatch.setattr(kept, "fixed_in_graphs", lambda weights: 0)
    taken: list[Any] = []

    def take() -> None:
        taken.append(kept._take(ours, None, 1, 1, 1))  # type: ignore[arg-type]

    held = Held(take)
    kept._kept[ours] = [held]  # type: ignore[list-item]
    if moment == "while another is kept":
        kept._keep(ours, SimpleNamespace(n_bytes=0, fixed=1))  # type: ignore[arg-type]
    take()
    held.other.join()
    assert taken.count(held) == 1
