"""`python -m benchmarks gpu` goes through every step, on a CPU with `--dry-run`, and goes on where it was cut off."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fastgpt_kernels
import pytest
import torch
from compilers import HAS_CXX, WITHOUT_CXX
from models import pair, tiny_config, token_ids
from paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.__main__ import main as benchmarks_main
from benchmarks.gpu import cold_start
from benchmarks.gpu import command as gpu
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu import run as gpu_run
from benchmarks.report import records
from fastgpt.bench import BenchmarkOptions, run_benchmark
from fastgpt.bench.parity import ParityError
from fastgpt.bench.workloads import load_base

COMMAND = [sys.executable, "-m", "benchmarks", "gpu"]
DRY = "--dry-run", "--minutes", "20"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    "FASTGPT_COMMIT": "of the test",  # or a commit between two runs would end the test
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def command_here(*arguments: str) -> int:
    """The exit status of a command that starts no process, called in this one, which spares its imports."""
    with (
        patch.object(sys, "argv", ["benchmarks", "gpu", *arguments]),
        patch.object(sys, "path", list(sys.path)),
        patch.dict(os.environ, ENVIRONMENT),
        pytest.raises(SystemExit) as ended,
    ):
        benchmarks_main()
    return int(ended.value.code or 0)


def test_bug_a_run_on_a_gpu_names_the_tests_of_every_kernel() -> None:
    """The folder moved, the pattern found nothing, and pytest without arguments would have run the whole suite."""
    named = [Path(test) for tests in gpu_run.full(["gpt2"], 1, 1).tests.values() for test in tests]
    assert all((ROOT / test).is_file() for test in named)
    operations = {path.parent.name for path in (ROOT / "kernels" / "fastgpt_kernels" / "operations").glob("*/op.py")}
    assert operations <= {file.parent.name for file in named} == set(gpu_run.tests_of_kernels())
    assert {"test_layer_norm.py", "test_engine_on_kernels.py", "test_model_on_kernels.py"} <= {f.name for f in named}


def test_a_run_on_a_gpu_leaves_out_the_tests_of_references() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    file = "tests/kernels/layer_norm/test_layer_norm.py"
    everything, chosen = (
        subprocess.run([*command, file, *options], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        for options in ((), gpu_kernels.WITHOUT_REFERENCES)
    )
    references, kernels = ([line for line in everything if f"[{kind}" in line] for kind in ("reference", "kernel"))
    assert len(references) == len(kernels) > 50
    assert [line for line in chosen if "::" in line] == kernels


PYTEST = """#!{python} -IS
import sys, time
print("FAILED tests/a.py::test_b - it is wrong", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("1 failed, 2 passed in 3.00s")
    sys.exit(2)
"""


def test_bug_tests_that_are_stopped_left_nothing_of_what_had_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(PYTEST.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = gpu_kernels.run_tests(["tests/a.py"], 1, limit_s=3)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert found["fault"] == "stopped after 3 s: 1 failed, 2 passed in 3.00s"
    assert found["failures"] == ["FAILED tests/a.py::test_b - it is wrong"]


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a dry run that was killed half-way, in the middle of a step, and what it had written."""
    folder = tmp_path_factory.mktemp("cut-off")
    file = folder / "result.json"
    process = subprocess.Popen([*COMMAND, *DRY, "--out", str(folder)], cwd=ROOT, env=ENVIRONMENT)
    try:
        stop_at = time.monotonic() + 600
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
    if not HAS_CXX:
        pytest.skip(f"a part of the smoke step: {WITHOUT_CXX}")
    finished = command(*DRY, "--out", str(cut_off[0]))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads((cut_off[0] / "result.json").read_text()), finished.stdout


def test_a_run_that_is_cut_off_leaves_what_it_had(cut_off: tuple[Path, dict[str, Any]]) -> None:
    result = cut_off[1]
    assert "decode tiny" in result["seconds"]
    assert "kernels tiny" in result
    assert "kernels tiny" not in result["seconds"]
    assert "profile tiny" not in result


def test_the_same_command_goes_on(cut_off: tuple[Path, dict[str, Any]], whole: tuple[dict[str, Any], str]) -> None:
    before, (after, _) = cut_off[1], whole
    assert list(after["seconds"]) == [name for steps in gpu.groups(gpu_run.dry()) for name in steps]
    for step in before["seconds"]:
        assert after[step] == before[step]
    for operation, rows in before["kernels tiny"].items():
        assert after["kernels tiny"][operation] == rows


def test_every_step_has_its_figures(whole: tuple[dict[str, Any], str]) -> None:
    result, output = whole
    assert records.faults(result) == []
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert " passed" in result["tests"]["layer_norm"]["summary"]
    assert set(result["smoke operations, float32"].values()) == {"agrees"}
    assert set(result["smoke generate, float32"].values()) == {"agrees"}
    assert result["smoke compile"]["fullgraph"]["difference"] <= 1e-5
    assert {row["operation"] for row in result["profile tiny"]["train, batch 2"]}
    assert set(result["waits"]) == {"grid barrier", "graph node"}
    assert "grid barrier: " in output
    assert set(result["ceilings"]) == {"memory", "large product", "products tiny"}
    assert {row["product"] for row in result["ceilings"]["products tiny"]} >= {"qkv", "fc", "head"}
    assert all(row["flops_per_s"] > 0 for row in result["ceilings"]["products tiny"])

    assert list(records.benchmarks(result)) == [
        *("decode tiny, batch 1", "decode tiny, batch 2", "prefill tiny, batch 2", "prefill tiny, batch 1"),
        "train tiny, batch 2",
        "decode batches tiny, batch 3",
        *("compiled tiny, decode, batch 1", "compiled tiny, decode, batch 2", "compiled tiny, prefill, batch 2"),
    ]
    for name, content in records.benchmarks(result).items():
        more = {"fastgpt, eager"} if name.startswith("decode tiny") else set()
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
    steps = {"decode step", "choice"}  # not the persistent kernel's, which only a GPU runs
    assert {row["operation"].partition(",")[0] for row in rows} == set(fastgpt_kernels.OPERATIONS) | steps
    assert {row["direction"] for row in rows if row["operation"].startswith("decode step")} == {"replay"}
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
    assert command_here("--dry-run", "--out", str(cut_off[0])) == 0
    assert file.stat().st_mtime_ns == before


# --- usage ----------------------------------------------------------------------------------------------------------


def test_nothing_starts_after_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_here("--dry-run", "--minutes", "0", "--out", str(tmp_path)) == 1
    assert "no time left" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--sizes", "gpt3"), "unknown size 'gpt3'"),
        ((), "no GPU is visible to torch") if not torch.cuda.is_available() else (("--sizes", ""), "unknown size ''"),
    ):
        assert command_here("--out", str(tmp_path), *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


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


def test_weights_are_drawn_on_the_device() -> None:
    """gpt2-xl takes a CPU half a minute."""
    drawn = set()

    class Drawn(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.normal_.default:
                drawn.add(args[0].device.type)
            return function(*args, **(kwargs or {}))

    extent = dataclasses.replace(gpu_run.dry(), device=torch.device("meta"), models={"small": "distilgpt2"})
    with Drawn():
        model, origin = gpu_run.Run(extent, {}, print).load("small")
    assert (origin, model.device.type, drawn) == ("random", "meta", {"meta"})


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


def test_gate_of_the_tiers() -> None:
    base, ids = pair(tiny_config())[0], token_ids(1, 8, 131)
    sequence = base.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for dtype in (torch.float32, torch.bfloat16):
        gpu_models.check_greedy_tokens(base, sequence, 8, dtype)
        wrong = sequence.clone()
        wrong[0, -1] = (wrong[0, -1] + 1) % 131
        with pytest.raises(ParityError, match="below the likeliest"):
            gpu_models.check_greedy_tokens(base, wrong, 8, dtype)
