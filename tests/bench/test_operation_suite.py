"""The pytest-benchmark suite of the operations runs, and times nothing that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT

WRONG = """
from fastgpt import ops

right = ops.layer_norm
ops.layer_norm = lambda *arguments: 1.01 * right(*arguments)
"""


def suite(*arguments: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    # A worker of pytest-xdist says so to its children, in which pytest-benchmark would then time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/operations/test_operations.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_every_pass_of_every_operation_is_timed(tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    finished = suite("--device", "cpu", "--runs", "5", f"--benchmark-json={file}")
    assert finished.returncode == 0, finished.stdout
    benchmarks = json.loads(file.read_text())["benchmarks"]
    groups = {benchmark["group"] for benchmark in benchmarks}
    operations = ("layer_norm", "add_layer_norm", "causal_attention", "gelu_mlp", "linear_cross_entropy")
    for operation in operations:
        for direction in ("forward", "backward", "forward+backward"):
            assert f"{operation}, tiny, {direction}" in groups
    for benchmark in benchmarks:
        assert benchmark["extra_info"]["bytes"] > 0
        assert benchmark["extra_info"]["flops"] > 0


def test_a_wrong_operation_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "wrong_operation.py").write_text(WRONG)
    arguments = ("-p", "wrong_operation", "--device", "cpu", "-k", "tiny-layer_norm and fastgpt")
    finished = suite(*arguments, paths=(tmp_path,))
    assert finished.returncode == 1
    assert "nothing was timed" in finished.stdout
    assert "3 errors" in finished.stdout


def test_an_unknown_size_is_wrong_usage() -> None:
    finished = suite("--device", "cpu", "--sizes", "gpt9")
    assert finished.returncode != 0
    assert "unknown size 'gpt9'" in finished.stdout + finished.stderr
