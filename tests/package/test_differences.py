"""Every intended difference from transformers is shown by a test."""

import ast
import re

import pytest
from paths import ROOT

PAGE = ROOT / "docs" / "differences.md"
ROWS = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
TESTS = {
    node.name
    for file in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef)
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("| "))
def test_a_difference_is_shown(row: list[str]) -> None:
    names = re.findall(r"`(test_\w+)`", row[-1])
    assert names
    assert [name for name in names if name not in TESTS] == []


def test_the_table_is_read() -> None:
    assert len(ROWS) > 20
    assert {len(row) for row in ROWS} == {5}
