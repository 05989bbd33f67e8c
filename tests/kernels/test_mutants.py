"""The tests notice mistakes in the kernels and in the rule of what is read directly.

`pytest tests/kernels/test_mutants.py -n 2 --mutants` tries all; `-k layer_norm` those of an operation, and `-k
"plain or twin or routing"` those of the rule.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = Path("kernels", "fastgpt_kernels")
# The tests that watch over a file of the kernels' package, or of fastgpt.
TESTS = {
    "operations/layer_norm/kernels.py": ["kernels/layer_norm", "kernels/every_operation"],
    "operations/attention/kernels.py": ["kernels/attention", "kernels/every_operation"],
    "operations/attention/backward_kernels.py": ["kernels/attention", "kernels/every_operation"],
    "operations/gelu_mlp/kernels.py": ["kernels/gelu_mlp", "kernels/every_operation"],
    "operations/gelu_mlp/op.py": ["kernels/gelu_mlp", "kernels/every_operation"],
    "common/arithmetic.py": ["kernels/gelu_mlp"],
    "common/precision.py": ["kernels/every_operation/test_precision.py"],
    "operations/linear_cross_entropy/kernels.py": ["kernels/linear_cross_entropy", "kernels/every_operation"],
    "operations/linear_cross_entropy/op.py": ["kernels/linear_cross_entropy", "kernels/every_operation"],
    "common/dropout.py": ["kernels/attention", "kernels/gelu_mlp"],
    "common/dropout_kernels.py": ["kernels/attention"],
    "operations/decode_step/kernels.py": ["kernels/decode_step"],
    "operations/decode_step/many_rows_kernels.py": ["kernels/decode_step"],
    "operations/decode_step/row_products.py": ["kernels/decode_step"],
    "operations/decode_step/op.py": ["kernels/decode_step"],
    "operations/sampling/kernels.py": ["kernels/sampling"],
    "operations/sampling/filter_kernels.py": ["kernels/sampling"],
    "operations/sampling/op.py": ["kernels/sampling"],
    "operations/persistent_decode/kernels.py": ["kernels/persistent_decode"],
    "operations/persistent_decode/op.py": ["kernels/persistent_decode"],
    "fastgpt/model/plain.py": ["model/test_plain_modules.py", "model/test_plain.py"],
    "fastgpt/model/twin.py": ["model/test_twin.py", "model/test_int8.py"],
    "fastgpt/generate/routing.py": ["model/test_twin.py"],
}


def path_of(file: str) -> Path:
    """The path of a file of `TESTS`, relative to the root."""
    return Path(file) if file.startswith("fastgpt/") else PACKAGE / file


@dataclass(frozen=True)
class Mutant:
    """Replace `before` by `after` in a file. survives: why no test can notice it, empty where one must."""

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


MUTANTS = read_mutants(Path(__file__).with_name("mutants.txt").read_text())


@pytest.mark.parametrize("file", TESTS)
def test_every_mutant_changes_one_place(file: str) -> None:
    code = (ROOT / path_of(file)).read_text()
    mutants = [mutant for mutant in MUTANTS if mutant.file == file]
    assert mutants
    for mutant in mutants:
        assert code.count(mutant.before) == 1, mutant.before
        assert mutant.after != mutant.before


def test_there_are_sixty_mutants_or_more() -> None:
    assert len({(mutant.file, mutant.before, mutant.after) for mutant in MUTANTS}) == len(MUTANTS) >= 60
    assert {mutant.file for mutant in MUTANTS} == TESTS.keys()


def test_the_documentation_counts_them() -> None:
    of_the_rule = [mutant for mutant in MUTANTS if mutant.file.startswith("fastgpt/")]
    n_kernels, n_rule = len(MUTANTS) - len(of_the_rule), len(of_the_rule)
    n_noticed = n_kernels - sum(bool(mutant.survives) for mutant in MUTANTS)
    text = " ".join((ROOT / "tests" / "README.md").read_text().split())
    assert f"holds {n_kernels} mistakes in the kernels and {n_rule} in the rule" in text
    assert f"{n_noticed} and {n_rule} are noticed" in text


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{i}-{m.file}" for i, m in enumerate(MUTANTS)])
def test_the_mutant_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    for directory in ("kernels", "tests", "fastgpt"):
        shutil.copytree(
            ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / path_of(mutant.file)
    file.write_text(file.read_text().replace(mutant.before, mutant.after))

    tests = [f"tests/{name}" for name in TESTS[mutant.file]]
    options = ["-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", "-k", "not [reference"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)

    assert str(tmp_path) in finished.stdout, "the tests did not run on the copy"
    expected = pytest.ExitCode.OK if mutant.survives else pytest.ExitCode.TESTS_FAILED
    assert finished.returncode == expected, finished.stdout[-2000:] + finished.stderr[-2000:]
