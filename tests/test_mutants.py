"""The tests notice mistakes in the kernels: `pytest tests/test_mutants.py --mutants -n 2` tries every mutant."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUSED = Path("kernels", "fastgpt_kernels", "fused")
# The tests that watch over a file of fused/.
TESTS = {
    "layer_norm_kernels.py": ["test_layer_norm_kernel.py"],
    "attention_kernels.py": ["test_causal_attention_kernel.py", "test_saved_tensors.py"],
    "gelu_mlp_kernels.py": ["test_gelu_mlp_kernel.py"],
    "gelu_mlp.py": ["test_gelu_mlp_kernel.py", "test_saved_tensors.py"],
    "activations.py": ["test_gelu_mlp_kernel.py"],
    "linear_cross_entropy_kernels.py": ["test_linear_cross_entropy_kernel.py"],
    "linear_cross_entropy.py": ["test_linear_cross_entropy_kernel.py"],
    "dropout.py": ["test_causal_attention_kernel.py"],
    "decode_step_kernels.py": ["test_decode_step_kernel.py"],
    "decode_step.py": ["test_decode_step_kernel.py"],
    "sampling_kernels.py": ["test_sampling_kernel.py"],
    "sampling_filter_kernels.py": ["test_sampling_kernel.py"],
    "sampling.py": ["test_sampling_kernel.py"],
    "persistent_decode_kernels.py": ["test_persistent_decode_kernel.py"],
    "persistent_decode.py": ["test_persistent_decode_kernel.py"],
}


@dataclass(frozen=True)
class Mutant:
    """Replace `before` by `after` in a file of fused/. survives: why no test can notice it, empty where one must."""

    file: str
    before: str
    after: str
    survives: str


def read_mutants(text: str) -> list[Mutant]:
    mutants, file = [], ""
    for record in text.split("\n\n"):
        lines = [line for line in record.splitlines() if not line.startswith("#")]
        if lines and lines[0].startswith("["):
            file = lines[0].strip("[]")
        elif lines:
            parts = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in "-+!")
            mutants.append(Mutant(file, *parts))
    return mutants


MUTANTS = read_mutants((ROOT / "tests" / "data" / "mutants.txt").read_text())


@pytest.mark.parametrize("file", TESTS)
def test_every_mutant_changes_one_place(file: str) -> None:
    code = (ROOT / FUSED / file).read_text()
    mutants = [mutant for mutant in MUTANTS if mutant.file == file]
    assert mutants
    for mutant in mutants:
        assert code.count(mutant.before) == 1, mutant.before
        assert mutant.after != mutant.before


def test_there_are_sixty_mutants_or_more() -> None:
    assert len({(mutant.file, mutant.before, mutant.after) for mutant in MUTANTS}) == len(MUTANTS) >= 60
    assert {mutant.file for mutant in MUTANTS} == TESTS.keys()


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{i}-{m.file.removesuffix('.py')}" for i, m in enumerate(MUTANTS)])
def test_the_mutant_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    for directory in ("kernels", "tests", "fastgpt"):
        shutil.copytree(
            ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / FUSED / mutant.file
    file.write_text(file.read_text().replace(mutant.before, mutant.after))

    tests = [f"tests/{name}" for name in TESTS[mutant.file]]
    options = ["-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)

    assert str(tmp_path) in finished.stdout, "the tests did not run on the copy"
    expected = pytest.ExitCode.OK if mutant.survives else pytest.ExitCode.TESTS_FAILED
    assert finished.returncode == expected, finished.stdout[-2000:] + finished.stderr[-2000:]
