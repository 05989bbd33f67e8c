"""`python -m benchmarks.gpu` goes through every step, on a CPU with `--dry-run`, and can be continued."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fastgpt_kernels
import torch

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_dry_run_takes_every_step(tmp_path: Path) -> None:
    finished = run("--dry-run", "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["parity"]["passed"]
    rows = result["kernels tiny"]
    assert {row["operation"].partition(",")[0] for row in rows} == set(fastgpt_kernels.OPERATIONS)
    assert all("fault" not in row and "skipped" not in row for row in rows), rows
    assert {row["contender"] for row in rows} >= {"fastgpt", "torch", "sdpa", "torch, unfused"}
    assert "forward+backward" in finished.stdout
    assert (tmp_path / "parity.txt").is_file()


def test_an_unfinished_run_is_continued(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = {"environment": {"machine": "as it was"}, "parity": {"passed": True}, "kernels tiny": []}
    file.write_text(json.dumps({"schema": 1, "dry_run": True, "seconds": {}} | done))
    assert run("--dry-run", "--out", str(tmp_path)).returncode == 0
    result = json.loads(file.read_text())
    assert {name: result[name] for name in done} == done
    assert result["rates"]
    assert list(result["seconds"]) == ["rates"]


def test_no_step_starts_after_the_time(tmp_path: Path) -> None:
    finished = run("--dry-run", "--minutes", "0", "--out", str(tmp_path))
    assert finished.returncode == 1
    assert "no time left for environment" in finished.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments, message in (
        (("--sizes", "gpt3"), "unknown size 'gpt3'"),
        ((), "no GPU is visible to torch") if not torch.cuda.is_available() else (("--sizes", ""), "unknown size ''"),
    ):
        finished = run("--out", str(tmp_path), *arguments)
        assert finished.returncode == 2
        assert message in " ".join(finished.stderr.replace("│", " ").split())
