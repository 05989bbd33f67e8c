"""The examples of the README print what stands there, and the links of the documentation lead somewhere."""

import os
import re
import subprocess
import sys
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
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize(("code", "output"), EXAMPLE.findall((ROOT / "README.md").read_text()))
def test_an_example_of_the_readme_prints_what_stands_there(code: str, output: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # where the printed figures are those of a CPU
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == output


def test_the_readme_has_three_examples() -> None:
    assert len(EXAMPLE.findall((ROOT / "README.md").read_text())) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(prose):
        if not target.startswith(("http", "mailto:")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
