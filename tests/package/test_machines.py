"""Ordinary machines: how each of their faults ends, and the warning it gives; docs/machines.md is the table."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from compilers import needs_launcher
from interpreter import releases
from paths import ROOT

TABLE = ROOT / "docs" / "machines.md"

# By fault: the variables that inject it, where the stand-in does not, and a part of the cause and of the cure.
FAULTS: dict[str, tuple[dict[str, str], str, str]] = {
    "no C compiler": ({"PATH": "/nowhere"}, "there is no C compiler", "apt-get install gcc, or set CC"),
    "CC names nothing": ({"CC": "/nowhere/cc"}, "CC names '/nowhere/cc', which is not there", "or set CC"),
    "no headers": ({}, "Python's headers are missing (Python.h)", "apt-get install python3-dev"),
    "unwritable cache": ({"TRITON_CACHE_DIR": __file__ + "/cache"}, "cannot write its cache", "set TRITON_CACHE_DIR"),
    "new GPU": ({}, "cannot compile here", "install a newer torch and the triton it asks for"),
    "old driver": ({}, "driver refuses what triton", "update the driver"),
    "no libcuda": ({}, "does not find the driver's libcuda.so.1", "set TRITON_LIBCUDA_PATH"),
    "old GPU": ({}, "need sm_80 or newer, and cuda:0 is sm_75", "need sm_80 or newer"),
    "no triton": ({}, "triton is not installed", "pip install triton; Linux only, so under Windows use WSL"),
}

# Those that show where a launcher can be built.
OF_A_LAUNCHER = {"no headers", "unwritable cache", "new GPU", "old driver", "no libcuda"}


def machine(fault: str, tmp_path: Path, **variables: str) -> dict:
    """What fastgpt does on a machine with a GPU and a fault, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CC")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    # Another triton than the installed one may come first in the path.
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    command = [sys.executable, Path(__file__).with_name("faulty_machine.py"), fault.replace(" ", "-").lower()]
    finished = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@needs_launcher
def test_a_sound_machine_runs_kernels_and_says_nothing(tmp_path: Path) -> None:
    assert machine("none", tmp_path) == {"ran": ["triton"], "warnings": [], "by_name": None}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=needs_launcher if f in OF_A_LAUNCHER else ()) for f in FAULTS])
def test_a_fault_is_said_once_and_torch_runs(fault: str, tmp_path: Path) -> None:
    variables, cause, cure = FAULTS[fault]
    found = machine(fault, tmp_path, **variables)
    assert found["ran"] == ["torch"]
    (warning,) = found["warnings"]
    assert warning.startswith("fastgpt runs in torch and not on its Triton kernels: ")
    assert cause in warning
    assert cure in warning
    assert "\n" not in warning
    assert cause in found["by_name"]


def test_the_table_has_every_fault() -> None:
    faults, _, _ = TABLE.read_text().partition("## ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in faults.splitlines() if "|" in line]
    told = {row[0]: row[2:4] for row in rows[2:]}
    assert told == {fault: [cause, cure] for fault, (_, cause, cure) in FAULTS.items()}


# --- versions -------------------------------------------------------------------------------------------------------


def pairs() -> list[list[str]]:
    """What CI tries: rows of torch, triton and transformers."""
    lines = (ROOT / ".ci" / "pairs").read_text().splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


def test_one_set_of_versions_is_said_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch_, triton_, transformers_ = (sorted(set(column)) for column in zip(*pairs(), strict=True))
    readme = " ".join((ROOT / "README.md").read_text().split())
    tried = f"torch {', '.join(torch_)} with triton {', '.join(triton_)} and transformers {', '.join(transformers_)}"
    assert tried in readme
    assert tuple(triton_) == releases.TRIED
    pythons = [name.rpartition(" ")[2] for name in project["classifiers"]]
    assert f"Python {pythons[0]} to {pythons[-1]}" in readme
    assert project["requires-python"] == f">={pythons[0]}"
    (least_triton,) = (line for line in project["dependencies"] if line.startswith("triton"))
    assert least_triton.startswith(f"triton>={triton_[0].removesuffix('.0')};")
    assert f"transformers>={transformers_[0].removesuffix('.0')},<6" in project["dependencies"]
    pinned_torch = f"torch=={torch_[0].rpartition('.')[0]}.*"
    assert pinned_torch in project["optional-dependencies"]["dev"]
    # Any other CPU build of torch would be replaced by the build with CUDA when fastgpt[dev] is installed.
    assert f"pip install '{pinned_torch}' --index-url" in readme


ASKED_BY_TORCH = [line for line in requires("torch") or [] if line.startswith("triton")]


@pytest.mark.skipif(not ASKED_BY_TORCH, reason="a CPU build of torch asks for no triton")
@pytest.mark.skipif(
    version("torch").partition("+")[0] != pairs()[0][0], reason="another torch than the README's line brings"
)
def test_the_first_pair_is_what_torch_itself_asks_for() -> None:
    assert any(line.startswith(f"triton=={pairs()[0][1]}") for line in ASKED_BY_TORCH)
