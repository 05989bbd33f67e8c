"""`python -m benchmarks tune` tries what it lists, checks it first, and keeps only what was measured to gain."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from fastgpt_kernels.operations.attention import tiles as attention_tiles
from fastgpt_kernels.operations.layer_norm import tiles as layer_norm_tiles
from interpreter.cooperative import cooperative_grid
from paths import ROOT

from benchmarks.gpu import steps, tune
from benchmarks.gpu.tune import Finding, Timing
from fastgpt.bench import operations
from fastgpt.bench.operations import TINY
from fastgpt.ops import backend


def layer_norm_case() -> operations.Case:
    cases = operations.cases(TINY["tiny"], 2, 9, torch.device("cpu"), torch.float32)
    return next(case for case in cases if case.operation == "add_layer_norm")


def timing(median_s: float, spread_s: float = 0.0) -> Timing:
    return Timing(median_s, median_s - spread_s / 2, median_s + spread_s / 2)


# --- the list -------------------------------------------------------------------------------------------------------


def all_cases() -> Iterator[operations.Case]:
    place, shape = torch.device("cpu"), TINY["tiny"]
    yield from operations.cases(shape, 1, 5, place, torch.float32)
    yield from tune.stream_cases(shape, 5, place, torch.bfloat16)
    # In float32 many rows go through torch's products.
    yield from steps.cases(shape, (tune.FEW, tune.MANY), 5, place, torch.bfloat16)
    yield steps.persistent_case(replace(shape, n_embd=64, n_head=1), 5, place, torch.bfloat16)


def test_every_tunable_is_read_by_its_case_and_has_candidates() -> None:
    left = set(range(len(tune.TUNABLES)))
    with backend("triton"), cooperative_grid(seed=0):
        for case in all_cases():
            wanted = [(i, tunable) for i, tunable in enumerate(tune.TUNABLES) if tunable.operation == case.operation]
            # One run for all, because some take seconds: each notes what it reads, and a number is always read.
            read: dict[int, dict[str, Any]] = {}
            run = partial(operations.check, case)
            for i, tunable in wanted:
                if callable(getattr(tunable.tiles, tunable.name)):
                    run = partial(noted, read, i, tunable, run)
                else:
                    read[i] = tune.shipped_values(tunable, run)
            run()
            for i, tunable in wanted:
                for call, shipped in read[i].items():
                    assert call.startswith(tunable.name)
                    assert tunable.candidates(shipped)
                    assert shipped not in tunable.candidates(shipped)
                    left.discard(i)
    assert [tune.TUNABLES[i] for i in left] == []


def noted(read: dict[int, dict[str, Any]], i: int, tunable: tune.Tunable, run: Callable[[], Any]) -> None:
    read[i] = tune.shipped_values(tunable, run)


def test_candidates_start_with_the_neighbours() -> None:
    shipped = attention_tiles.AttentionTile(64, 64, 4, 3)
    candidates = tune.Tunable("add_layer_norm", "forward", "attention_tile", tune._SCORES).candidates(shipped)
    distances = [sum(a != b for a, b in zip(tile, shipped, strict=True)) for tile in candidates]
    assert distances[0] == 1
    assert distances == sorted(distances)
    assert len(set(candidates)) == len(candidates) == 3 * 3 * 2 * 3 - 1


def test_patch_reaches_the_selected_calls_and_is_undone() -> None:
    tunable = tune.Tunable("add_layer_norm", "forward", "layer_norm_tile", {}, tune._kernel("fwd"))
    shipped = layer_norm_tiles.layer_norm_tile
    wanted, other = layer_norm_tiles.LayerNormTile(256, 1, 1), shipped("bwd", 100, "sm_90")
    with tune.patched(tunable, wanted):
        assert layer_norm_tiles.layer_norm_tile("fwd", 100, "sm_90") == wanted
        assert layer_norm_tiles.layer_norm_tile("bwd", 100, "sm_90") == other
    assert layer_norm_tiles.layer_norm_tile is shipped


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shipped", "candidate", "kept"),
    [
        (timing(1.00), timing(0.90), True),
        (timing(1.00), timing(0.99), False),  # below 2%
        (timing(1.00, spread_s=0.2), timing(0.90), False),  # within the spread
        (timing(0.90), timing(1.00), False),
    ],
)
def test_only_gains_beyond_the_spread_are_kept(shipped: Timing, candidate: Timing, kept: bool) -> None:
    assert tune.is_gain([shipped] * 5, [candidate] * 5) is kept


def test_a_gain_that_does_not_repeat_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    lucky = [timing(1.0), timing(0.5)] + [timing(1.0)] * 10
    monkeypatch.setattr(tune, "_time", lambda *_: lucky.pop(0))
    tunable = tune.Tunable("add_layer_norm", "forward", "LAYER_NORM_REDUCE_COLS", {"": (8, 16)})
    with backend("triton"):
        (finding,) = tune.search(layer_norm_case(), tunable, "tiny", tune.FULL, float("inf"))
    assert finding.best == 16
    assert finding.gain is None
    assert "nothing beat" in tune.to_paste([finding], "here")


def test_a_gain_is_ready_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(case: operations.Case, direction: str, row_s: float) -> Timing:
        return timing(0.5 if layer_norm_tiles.layer_norm_tile("fwd", 32, "cpu").num_warps == 8 else 1.0)

    monkeypatch.setattr(tune, "_time", time)
    tunable = tune.Tunable("add_layer_norm", "forward", "layer_norm_tile", {"num_warps": (4, 8)}, tune._kernel("fwd"))
    with backend("triton"):
        (finding,) = tune.search(layer_norm_case(), tunable, "tiny", tune.FULL, float("inf"))
    assert finding.gain == 2
    comment, code = tune.to_paste([finding], "Some GPU").splitlines()
    assert comment.startswith("# layer_norm_tile('fwd', 32, 'cpu'): 2.00x the speed of LayerNormTile(")
    assert comment.endswith("on Some GPU.")
    assert eval(code, dict(vars(layer_norm_tiles))) == finding.shipped._replace(num_warps=8)


def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(*_: Any) -> Timing:
        raise AssertionError("timed")

    monkeypatch.setattr(tune, "_time", time)
    # A tile narrower than the row normalises a part of it.
    tunable = tune.Tunable("add_layer_norm", "forward", "layer_norm_tile", {"block_cols": (16,)}, tune._kernel("fwd"))
    with backend("triton"):
        (finding,) = tune.search(layer_norm_case(), tunable, "tiny", tune.FULL, float("inf"))
    assert finding.n_tried == len(finding.refused) == 1
    assert finding.best is None


def test_no_candidate_is_tried_after_the_time() -> None:
    with backend("triton"):
        (finding,) = tune.search(layer_norm_case(), tune.TUNABLES[0], "tiny", tune.FULL, 0.0)
    assert (finding.n_tried, finding.gain) == (0, None)
    assert finding.n_candidates > 0


# --- the command ----------------------------------------------------------------------------------------------------


def test_dry_run_takes_every_step(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}
    file = tmp_path / "tuned.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "tune",
        "--dry-run",
        "--only",
        "add_layer",
        "--out",
        str(file),
    ]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    written = json.loads(file.read_text())
    assert written["dry_run"]
    assert {(row["operation"], row["call"].partition("(")[0]) for row in written["findings"]} == {
        (tunable.operation, tunable.name) for tunable in tune.TUNABLES if tunable.operation == "add_layer_norm"
    }
    assert all(Finding(**row).n_tried for row in written["findings"])
    assert finished.stdout.startswith("# ")


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="unknown size 'gpt3'"):
        tune.main(out=tmp_path / "x.json", sizes="gpt3")
