"""Tests that compile or export, with their first parameters, again in a process where nothing has run.

There the modules of the kernels are imported while torch.compile traces the call that needs them. The first such test
of each file, and all of them if asked for.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import INTERPRETING

TESTS = Path(__file__).parents[1]
CALLS = ("torch.compile(", "torch.export.export(")
# Imports once what takes long, and no kernel; then runs every test in a fork of its own.
FORKS = '''
import os, sys
import hypothesis, peft, pytest, torch._dynamo, torch._inductor.compile_fx, transformers, triton
import fastgpt, fastgpt_kernels

class OnlyTheFirst:
    """Runs a test with the first of its parameters: at the second, the process would no longer be fresh."""

    def pytest_collection_modifyitems(self, items):
        del items[1:]

failed = []
for test in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os._exit(pytest.main(["-q", "-p", "no:cacheprovider", test], plugins=[OnlyTheFirst()]))
    if os.waitpid(child, 0)[1] != 0:
        failed.append(test)
kernels = {f"fastgpt_kernels.operations.{name}.op" for name in fastgpt_kernels.KERNEL_MODULES.values()}
assert kernels.isdisjoint(sys.modules), kernels & set(sys.modules)
sys.exit(f"failed: {failed}" if failed else 0)
'''


def compiling_tests() -> list[str]:
    """The tests that call `CALLS`, also in the files that import them from another."""
    found, imported = set(), set()
    for file in TESTS.rglob("test_*.py"):
        text = file.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                if any(call in (ast.get_source_segment(text, node) or "") for call in CALLS):
                    found.add((file, node.name))
            elif isinstance(node, ast.ImportFrom):
                imported |= {(file, node.module, alias.name) for alias in node.names}
    of_module = {(file.stem, name) for file, name in found}
    again = {(file, name) for file, module, name in imported if (module, name) in of_module}
    return sorted(f"{file.relative_to(TESTS.parent)}::{name}" for file, name in found | again)


def run(names: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"HF_HUB_OFFLINE": "1"} | ({"TRITON_INTERPRET": "1"} if INTERPRETING else {})
    finished = subprocess.run(
        [sys.executable, "-c", FORKS, *names], cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


def test_in_a_fresh_process() -> None:
    first_of_file = {name.partition("::")[0]: name for name in reversed(compiling_tests())}
    assert "tests/model/test_model_on_kernels.py" in first_of_file
    run([*first_of_file.values()])


@pytest.mark.soak
def test_every_one_in_a_fresh_process() -> None:
    names = compiling_tests()
    assert "tests/model/test_model_on_kernels.py::test_compile_fullgraph_forward_and_backward" in names
    run(names)
