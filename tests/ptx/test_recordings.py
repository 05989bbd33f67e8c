"""Recordings of launches, of the executor in place of a GPU: they hold what a launch needs, and differences show."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

# Pointers, tensor descriptors with dtypes of triton, views of packed tensors, backward passes.
CALLS = [
    "add_layer_norm bf16 C=256",
    "causal_attention bf16 D=64",
    "linear_cross_entropy bf16 mean",
    "gelu_mlp bf16 gelu residual dropout",
]
RECORDING = f"""
import json, sys
from pathlib import Path
import torch
from ptx.launch import executing
from ptx.recordings import Recording, differences, record

def unequal():
    return [found for _, found in differences(loaded)]

file = Path(sys.argv[1])
with executing("sm_90", n_multiprocessors=3):
    made = record({CALLS!r}, torch.device("cpu"))
made.save(file)
loaded = Recording.load(file)
result = {{"kernels": [launch["kernel"].partition(":")[2] for launch in made.launches], "left out": made.left_out}}
result["the same"] = unequal()

stored = sorted(name for name in loaded.bytes if name.startswith("1.after") and loaded.bytes[name].any())
loaded.bytes[stored[0]][0] ^= 1
result["a bit of launch 1"] = unequal()

loaded = Recording.load(file)
loaded.launches[2]["ptx"] = loaded.launches[2]["ptx"].replace("add.f32", "sub.f32")
result["the code of launch 2"] = unequal()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings") / "launches.safetensors"


def run(file: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(file.parent / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "kernels"), *sys.path])
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(file: Path) -> dict[str, Any]:
    finished = run(file, "-c", RECORDING, str(file))
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_launches_are_recorded_and_give_the_same_bits(found: dict[str, Any]) -> None:
    assert found["left out"] == {}
    assert len(set(found["kernels"])) == 12
    assert found["the same"] == [{} for _ in found["kernels"]]


@pytest.mark.parametrize(("what", "launch"), [("a bit of launch 1", 1), ("the code of launch 2", 2)])
def test_a_difference_is_found_in_its_launch(what: str, launch: int, found: dict[str, Any]) -> None:
    assert [place for place, unequal in enumerate(found[what]) if unequal] == [launch]


def test_the_command_compares_each_launch(file: Path, found: dict[str, Any]) -> None:
    finished = run(file, "-m", "ptx.recordings", "compare", str(file))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("the same bits") == len(found["kernels"])
