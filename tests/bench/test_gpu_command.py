"""`python -m benchmarks gpu` goes through every step, on a CPU with `--dry-run`, and goes on where it was cut off."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastgpt_kernels
import pytest
import torch
from models import pair, tiny_config, token_ids
from paths import ROOT

from benchmarks.gpu import cold_start
from benchmarks.gpu import command as gpu
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.run import OutOfTime, Run, take
from benchmarks.report import records
from fastgpt.bench import BenchmarkOptions, run_benchmark
from fastgpt.bench.parity import ParityError
from fastgpt.bench.workloads import load_base

COMMAND = [sys.executable, "-m", "benchmarks", "gpu"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels")),
    "FASTGPT_COMMIT": "of the test",  # or a commit between two runs would end the test
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def test_bug_a_run_on_a_gpu_names_the_tests_of_every_kernel() -> None:
    """The folder moved, the pattern found nothing, and pytest without arguments would have run the whole suite."""
    named = {Path(test).name for test in gpu_run.full(["gpt2"], 1, 1).tests}
    parts = "causal_attention", "gelu_mlp", "layer_norm", "linear_cross_entropy", "decode_step", "persistent_decode"
    assert named >= {f"test_{part}_kernel.py" for part in (*parts, "sampling")} | {"test_engine_on_kernels.py"}
    assert all((ROOT / test).is_file() for test in gpu_run.full(["gpt2"], 1, 1).tests)


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a dry run that was killed half-way, in the middle of a step, and what it had written."""
    folder = tmp_path_factory.mktemp("cut-off")
    file = folder / "result.json"
    process = subprocess.Popen([*COMMAND, "--dry-run", "--out", str(folder)], cwd=ROOT, env=ENVIRONMENT)
    try:
        stop_at = time.monotonic() + 300
        while not (file.is_file() and len(json.loads(file.read_text()).get("kernels tiny", {})) >= 2):
            assert process.poll() is None
            assert time.monotonic() < stop_at
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    return folder, json.loads(file.read_text())


@pytest.fixture(scope="module")
def whole(cut_off: tuple[Path, dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The result and the output of the same command once more."""
    finished = command("--dry-run", "--out", str(cut_off[0]))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads((cut_off[0] / "result.json").read_text()), finished.stdout


def test_a_run_that_is_cut_off_leaves_what_it_had(cut_off: tuple[Path, dict[str, Any]]) -> None:
    result = cut_off[1]
    assert "decode tiny" in result["seconds"]
    assert "kernels tiny" in result
    assert "kernels tiny" not in result["seconds"]
    assert "train tiny" not in result


def test_the_same_command_goes_on(cut_off: tuple[Path, dict[str, Any]], whole: tuple[dict[str, Any], str]) -> None:
    before, (after, _) = cut_off[1], whole
    assert list(after["seconds"]) == [name for name, _ in gpu.steps(["tiny"])]
    for step in before["seconds"]:
        assert after[step] == before[step]
    for operation, rows in before["kernels tiny"].items():
        assert after["kernels tiny"][operation] == rows


def test_every_step_has_its_figures(whole: tuple[dict[str, Any], str]) -> None:
    result, output = whole
    assert records.faults(result) == []
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["parity"]["tests"]["passed"]
    assert set(result["waits"]) == {"grid barrier", "graph node"}
    assert "grid barrier: " in output
    assert set(result["ceilings"]) == {"memory", "large product", "products tiny"}
    assert {row["product"] for row in result["ceilings"]["products tiny"]} >= {"qkv", "fc", "head"}
    assert all(row["flops_per_s"] > 0 for row in result["ceilings"]["products tiny"])

    assert list(records.benchmarks(result)) == [
        *("decode tiny, batch 1", "decode tiny, batch 2", "prefill tiny, batch 2", "prefill tiny, batch 1"),
        "train tiny, batch 2",
    ]
    for name, content in records.benchmarks(result).items():
        more = {"fastgpt, eager"} if name.startswith("decode") else set()
        more |= {"fastgpt, lookup 8"} if name == "decode tiny, batch 1" else set()
        assert {row["contender"] for row in content["results"]} == {"fastgpt", "hf-sdpa"} | more
        assert content["gate"]
    assert set(result["memory tiny"]) == {f"{work}, batch {n}" for work in ("prefill", "train") for n in (1, 2)}
    assert set(result["latency tiny"]) == {"context 8", "context 16"}
    starts = result["cold start tiny"]["tiny"]
    assert all(start["total_s"] > start["model_s"] + start["token_s"] for kind in starts for start in starts[kind])
    assert "decode tiny, batch 1" in output


def test_every_operation_is_timed_beside_others(whole: tuple[dict[str, Any], str]) -> None:
    rows = records.operations(whole[0])["tiny"]
    assert {row["operation"].partition(",")[0] for row in rows} == set(fastgpt_kernels.OPERATIONS)
    timed = {row["contender"] for row in rows if "median_s" in row}
    assert timed >= {"fastgpt", "torch", "sdpa", "torch, unfused"}
    left_out = {row["contender"]: row["skipped"] for row in rows if "skipped" in row}
    assert timed | set(left_out) >= {"liger", "cut-cross-entropy", "flash-attn 2"}
    assert "forward+backward" in whole[1]


def test_a_finished_run_is_left_as_it_is(
    cut_off: tuple[Path, dict[str, Any]], whole: tuple[dict[str, Any], str]
) -> None:
    file = cut_off[0] / "result.json"
    before = file.stat().st_mtime_ns
    assert command("--dry-run", "--out", str(cut_off[0])).returncode == 0
    assert file.stat().st_mtime_ns == before


# --- usage ----------------------------------------------------------------------------------------------------------


def test_nothing_starts_after_the_time(tmp_path: Path) -> None:
    finished = command("--dry-run", "--minutes", "0", "--out", str(tmp_path))
    assert finished.returncode == 1
    assert "no time left" in finished.stderr
    assert not (tmp_path / "result.json").exists()


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments, message in (
        (("--sizes", "gpt3"), "unknown size 'gpt3'"),
        ((), "no GPU is visible to torch") if not torch.cuda.is_available() else (("--sizes", ""), "unknown size ''"),
    ):
        finished = command("--out", str(tmp_path), *arguments)
        assert finished.returncode == 2
        assert message in " ".join(finished.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "another kind"),
        ({"dry_run": False}, "another kind"),
        ({"batch": 99}, "another kind"),
        ({"environment": {"machine": {"gpu": "Some GPU"}, "versions": {}, "commit": None}}, "of another GPU"),
    ],
)
def test_what_another_machine_left_is_not_continued(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    kind = {"schema": gpu.SCHEMA, "dry_run": True, "batch": gpu_run.dry().n_batch}
    left = kind | {"seconds": {"environment": 0.1}} | change
    (tmp_path / "result.json").write_text(json.dumps(left))
    with pytest.raises(gpu.typer.BadParameter, match=message):
        gpu._result(tmp_path / "result.json", True, gpu_run.dry())


# --- whole models ---------------------------------------------------------------------------------------------------


def test_a_prefill_may_fill_the_context_and_needs_no_second_loading() -> None:
    loaded = load_base("demo")
    n_positions = loaded[0].config.n_positions
    options = BenchmarkOptions(
        model="unknown to anyone",
        workloads="prefill",
        prompt_tokens=n_positions,
        device="cpu",
        dtype="float32",
        baselines="hf-sdpa",
        runs=5,
    )
    rates = {"bandwidth": 1e9, "matrix_rate": 1e9}
    result = run_benchmark(options, loaded=loaded, rates=rates)
    assert result["rates"] == rates
    assert result["gate"]["inference"]["greedy_tokens"] == 1
    assert {row["n_tokens"] for row in result["results"]} == {n_positions}


# --- one step -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(gpu_run.dry(), time.monotonic() + 600, tmp_path / "result.json", {"seconds": {}}, print)


def test_time_that_runs_out_in_a_step_leaves_the_rest_to_the_next_run(run: Run) -> None:
    def step(run: Run) -> Iterator[tuple[str, Any]]:
        yield "first", lambda: 1
        yield "second", lambda: setattr(run, "stop_at", 0) or 2
        yield "third", lambda: 3

    with pytest.raises(OutOfTime):
        take(run, "step", step)
    left = json.loads(run.file.read_text())
    assert left == {"seconds": {}, "step": {"first": 1, "second": 2}}

    run.stop_at = time.monotonic() + 600
    run.result["step"]["first"] = "as it was"
    take(run, "step", step)
    written = json.loads(run.file.read_text())
    assert written["step"] == {"first": "as it was", "second": 2, "third": 3}
    assert list(written["seconds"]) == ["step"]


def test_time_that_runs_out_in_a_part_leaves_no_trace_of_it(run: Run) -> None:
    def measure() -> None:
        run.stop_at = 0
        run.check_time("warming up", 1, 2)

    with pytest.raises(OutOfTime):
        take(run, "step", lambda run: iter([("part", measure)]))
    assert "step" not in run.result


def test_what_fails_is_written_down_and_the_others_go_on(run: Run) -> None:
    def wrong() -> None:
        raise ParityError("result 0 errs by 1\nand more")

    take(run, "step", lambda run: iter([("wrong", wrong), ("right", lambda: 1)]))
    assert run.result["step"] == {"wrong": {"fault": "ParityError: result 0 errs by 1"}, "right": 1}
    assert records.faults(run.result) == ["step, wrong: ParityError: result 0 errs by 1"]


def test_a_wrong_token_is_no_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = json.dumps({"token": 7, "model_s": 0.1, "token_s": 0.2, "ended": time.time() + 9})
    finished = subprocess.CompletedProcess([], 0, stdout=printed, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: finished)
    arguments = "folder", [1, 2], torch.device("cpu"), torch.float32
    assert 8 < cold_start.measure(*arguments, 7, "cache")["total_s"] < 10
    with pytest.raises(ParityError, match="is 7, not 8"):
        cold_start.measure(*arguments, 8, "cache")
    finished = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: no kernel")
    with pytest.raises(RuntimeError, match="no kernel"):
        cold_start.measure(*arguments, 7, "cache")


def test_what_takes_more_than_its_share_is_left_to_the_next_run(run: Run) -> None:
    def endless() -> None:
        raise subprocess.TimeoutExpired("pytest", 60)

    take(run, "parity", lambda run: iter([("tests", endless)]))
    assert run.result == {"seconds": {}}


def test_a_lost_gpu_starts_the_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def lost(*arguments: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    def start_again(arguments: list[str]) -> None:
        started.append(arguments)
        raise SystemExit

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "take", lost)
    monkeypatch.setattr(gpu, "_start_again", start_again)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--dry-run", "--minutes", "8"])
    with pytest.raises(SystemExit):
        gpu.main(tmp_path, minutes=2, dry_run=True)
    assert started[0][:3] == ["--dry-run", "--minutes", "8"]
    assert 1.5 < float(started[0][3].removeprefix("--minutes=")) <= 2


def test_gate_of_the_tiers() -> None:
    base, ids = pair(tiny_config())[0], token_ids(1, 8, 131)
    sequence = base.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for dtype in (torch.float32, torch.bfloat16):
        gpu_models.check_greedy_tokens(base, sequence, 8, dtype)
        wrong = sequence.clone()
        wrong[0, -1] = (wrong[0, -1] + 1) % 131
        with pytest.raises(ParityError, match="below the likeliest"):
            gpu_models.check_greedy_tokens(base, wrong, 8, dtype)
