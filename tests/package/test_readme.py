"""The examples of the README print what stands there, the Python of docs/ runs, and the links lead somewhere."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "kernels", "benchmarks", "tests") for page in (ROOT / folder).rglob("*.md")),
    ]
)
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES_WITH_PYTHON = [page for page in sorted((ROOT / "docs").rglob("*.md")) if PYTHON.search(page.read_text())]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def run(code: str, folder: Path, **environment: str) -> str:
    """What Python prints that runs a reader's code in a folder of its own."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # where the printed figures are those of a CPU
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=inherited | environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize(("code", "output"), EXAMPLE.findall((ROOT / "README.md").read_text()))
def test_an_example_of_the_readme_prints_what_stands_there(code: str, output: str, tmp_path: Path) -> None:
    assert run(code, tmp_path) == output


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """All of a page in one process, because later lines use what earlier ones made."""
    repaired = "import interpreter\n" if find_spec("triton") else ""  # some releases of triton's own do not run here
    run(repaired + "\n".join(PYTHON.findall(page.read_text())), tmp_path, TRITON_INTERPRET="1")


def test_the_page_of_behaviour_has_python() -> None:
    assert ROOT / "docs" / "behaviour.md" in PAGES_WITH_PYTHON


def test_the_readme_has_three_examples() -> None:
    assert len(EXAMPLE.findall((ROOT / "README.md").read_text())) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(prose):
        if not target.startswith(("http", "mailto:")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
