"""Run compiled kernels on the CPU warp by warp: no race, no stray access, no deadlock (ptx/README.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastgpt_kernels.audit import shipped
from fastgpt_kernels.common import chip
from paths import ROOT

# One call of every operation: the one with the most features among those that take seconds.
CALLS = {
    "layer_norm": "bf16 C=768",
    "add_layer_norm": "bf16 C=768",
    "causal_attention": "bf16 D=64 mask dropout",
    "linear_cross_entropy": "bf16 mean",
    "gelu_mlp": "bf16 gelu residual dropout",
    "sample": "bf16 top-k, top-p, penalty",
}
# Those that take minutes, with warps one by one through rows of 768 channels.
LONG_CALLS = {"decode": "bf16 small B=1", "persistent_decode": "bf16 small"}
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


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # What is cached there has no machine code, and a kernel of a file is compiled as triton.jit finds it.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "kernels"), *sys.path])
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def assert_nothing_noticed(tmp_path: Path, call: str) -> None:
    finished = run(tmp_path, "-m", "ptx", "--only", call)
    assert finished.returncode in (0, 1), finished.stderr
    found = json.loads(finished.stdout)
    assert found["problems"] == []
    assert found["launches"] >= len(found["kernels"]) >= 1


@pytest.mark.parametrize("operation", CALLS)
def test_compiled_kernels_run_without_a_hazard(operation: str, tmp_path: Path) -> None:
    assert_nothing_noticed(tmp_path, f"{operation} {CALLS[operation]}")


def test_compiled_kernels_are_as_accurate_as_eager(tmp_path: Path) -> None:
    tests = [str(ROOT / "tests" / name) for name in PARITY]
    finished = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "ptx.plugin", *tests)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]
    assert f"{len(tests)} passed" in finished.stdout


@pytest.mark.ptx
@pytest.mark.parametrize("operation", LONG_CALLS)
def test_compiled_kernels_of_decoding_run_without_a_hazard(operation: str, tmp_path: Path) -> None:
    assert_nothing_noticed(tmp_path, f"{operation} {LONG_CALLS[operation]}")


@pytest.mark.ptx
@pytest.mark.parametrize("operation", CALLS)
def test_every_form_runs_without_a_hazard(operation: str, tmp_path: Path) -> None:
    assert_nothing_noticed(tmp_path, f"{operation} *")


def test_every_operation_that_ships_is_run() -> None:
    with chip.assume(chip.Chip("sm_90", 132)):
        shipped_calls = {(call.operation, call.label) for call in shipped.calls("sm_90")}
    assert {operation for operation, _ in shipped_calls} == CALLS.keys() | LONG_CALLS.keys()
    assert shipped_calls >= (CALLS | LONG_CALLS).items()


@pytest.mark.parametrize(("edit", "expected"), [("None", "32640.0 []"), ("without_barriers", "shared race")])
def test_a_missing_barrier_is_noticed(edit: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "racing.py"
    file.write_text(RACING.replace("EDIT", edit))
    finished = run(tmp_path, str(file))
    assert finished.returncode == 0, finished.stderr
    assert expected in finished.stdout
