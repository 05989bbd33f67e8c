"""The README of each operation quotes its kernels and links to files that exist."""

import re
from pathlib import Path

import pytest

OPERATIONS = Path(__file__).parents[2] / "kernels" / "fastgpt_kernels" / "operations"
READMES = sorted(OPERATIONS.glob("*/README.md"))


def _lines(code: str) -> list[str]:
    """The lines without whitespace and comments."""
    return ["".join(line.partition("#")[0].split()) for line in code.splitlines()]


def test_every_operation_has_a_lesson() -> None:
    assert [readme.parent for readme in READMES] == sorted(path.parent for path in OPERATIONS.glob("*/kernels.py"))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_the_central_lines_are_those_of_the_kernels(readme: Path) -> None:
    lesson = readme.read_text().split("**The central lines**", 1)[1]
    quoted = re.search(r"```python\n(.*?)```", lesson, re.DOTALL)
    assert quoted is not None

    # One string, because a statement may be wrapped in the kernel, where it is indented.
    kernels = "".join(_lines(readme.with_name("kernels.py").read_text()))
    assert [line for line in _lines(quoted[1]) if line not in kernels] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_and_pictures_exist(readme: Path) -> None:
    prose = re.sub(r"```.*?```", "", readme.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    assert files
    assert [file for file in files if not (readme.parent / file).exists()] == []
