"""Runs of `fastgpt train` on a tiny model: their options, what they leave behind, and how to disturb them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt import trainer

CONTEXT = 32
# 8 steps of 2 * 4 sequences; the 6th begins the second pass.
OPTIONS = ["--context", str(CONTEXT), "--steps", "8", "--batch", "4", "--accumulate", "2", "--every", "2"]
OPTIONS += ["--learning-rate", "0.01", "--seed", "3"]


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_model(out: Path, whole: Path) -> None:
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    losses = [[entry.get("loss") or entry["eval_loss"] for entry in log_of(folder)] for folder in (out, whole)]
    assert losses[0] == losses[1]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something at the end of a step, before anything is saved."""
    on_step_end = trainer.Report.on_step_end

    def and_act(self, args, state, *more, **named) -> None:
        on_step_end(self, args, state, *more, **named)
        if state.global_step == step:
            act()

    monkeypatch.setattr(trainer.Report, "on_step_end", and_act)
