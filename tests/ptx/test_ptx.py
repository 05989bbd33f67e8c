"""Run compiled kernels on the CPU warp by warp: no race, no stray access, no deadlock (ptx/README.md)."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from fastgpt_kernels.audit import shipped
from fastgpt_kernels.common import chip
from paths import ROOT

# Calls of `shipped` whose every machine code is executed on a sample of its programs: all of one dtype, in parts, those
# with the name of a large model on request.
PARTS = {
    "norms, loss, MLP, sampling": ["*layer_norm bf16*", "linear_cross_entropy bf16*", "gelu_mlp bf16*", "sample *"],
    "attention": ["causal_attention bf16*"],
    "decoding, small": ["decode bf16 small*", "decode bf16 int8 small*", "decode bf16 int4 small*"],
    "decoding, xl": ["decode bf16 xl*"],
    "decoding, xl in int8": ["decode bf16 int8 xl*"],
    "decoding, xl in int4": ["decode bf16 int4 xl*"],
}
# It is compiled for the number of multiprocessors, and its programs wait for each other: minutes.
ONLY_ON_REQUEST = {"persistent_decode"}
OPERATIONS = [
    "layer_norm", "add_layer_norm", "causal_attention", "linear_cross_entropy", "gelu_mlp", "decode", "sample",
]  # fmt: skip
# Of the tests of kernels some that run from PTX too: in float64 (dtype0), whose arguments the interpreter does not
# round, and in bfloat16 (dtype2).
PARITY = [
    "kernels/layer_norm/test_layer_norm.py::test_add_layer_norm_is_as_accurate_as_eager[kernel-shape1-0.1-dtype0]",
    "kernels/layer_norm/test_layer_norm.py::test_add_layer_norm_is_as_accurate_as_eager[kernel-shape1-0.1-dtype2]",
    "kernels/gelu_mlp/test_gelu_mlp.py::test_residual_and_dropout[kernel-shape2-8-0.25-dtype0]",
    "kernels/gelu_mlp/test_gelu_mlp.py::test_residual_and_dropout[kernel-shape2-8-0.25-dtype2]",
]
RACING = """
import torch, triton, triton.language as tl
from ptx.launch import executing

@triton.jit
def _sum_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))

def without_barriers(name, text):
    return "".join(line for line in text.splitlines(True) if not line.strip().startswith("bar.sync"))

x = torch.arange(256.0)
with executing("sm_90", edit=EDIT, warps=True) as session:
    _sum_kernel[(1,)](x, BLOCK=256)
print(x[0].item(), sorted({kind for _, kind, _ in session.problems()}))
"""


def run(cache: Path | None, *command: str) -> subprocess.CompletedProcess[str]:
    """cache: a folder of its own where no machine code is made; None for the one that the audit has too."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "kernels"), *sys.path])
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def assert_nothing_noticed(*options: str) -> None:
    finished = run(None, "-m", "ptx", *options)
    assert finished.returncode in (0, 1), finished.stderr
    found = json.loads(finished.stdout)
    assert found["problems"] == []
    assert found["launches"] >= len(found["kernels"]) >= 1


@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.ptx] * ("xl" in part)) for part in PARTS])
def test_compiled_kernels_run_without_a_hazard(part: str) -> None:
    assert_nothing_noticed("--once", "--only", *PARTS[part])


def test_compiled_kernels_are_as_accurate_as_eager(tmp_path: Path) -> None:
    tests = [str(ROOT / "tests" / name) for name in PARITY]
    finished = run(tmp_path / "cache", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "ptx.plugin", *tests)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]
    assert f"{len(tests)} passed" in finished.stdout


@pytest.mark.ptx
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_form_runs_without_a_hazard(operation: str, architecture: str) -> None:
    assert_nothing_noticed("--arch", architecture, "--only", f"{operation} *")


@pytest.mark.ptx
def test_persistent_decoding_runs_without_a_hazard() -> None:
    assert_nothing_noticed("--only", "persistent_decode bf16 small")


def test_everything_that_ships_is_run() -> None:
    with chip.assume(chip.Chip("sm_90", 132)):
        calls = [(call.operation, f"{call.operation} {call.label}") for call in shipped.calls("sm_90")]
    assert {operation for operation, _ in calls} == {*OPERATIONS} | ONLY_ON_REQUEST
    patterns = [pattern for part in PARTS.values() for pattern in part]
    left_out = {o for o, name in calls if " bf16" in name and not any(fnmatchcase(name, p) for p in patterns)}
    # Norms of float32 whose result is bfloat16 are not of one dtype.
    assert left_out == ONLY_ON_REQUEST | {"layer_norm", "add_layer_norm"}


@pytest.mark.parametrize(("edit", "expected"), [("None", "32640.0 []"), ("without_barriers", "shared race")])
def test_a_missing_barrier_is_noticed(edit: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "racing.py"
    file.write_text(RACING.replace("EDIT", edit))
    finished = run(tmp_path / "cache", str(file))
    assert finished.returncode == 0, finished.stderr
    assert expected in finished.stdout
