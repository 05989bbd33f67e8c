"""Fixtures of the tests of linear_cross_entropy."""

import pytest

from .formula import several_programs


@pytest.fixture(autouse=True)
def _several_chunks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    several_programs(monkeypatch)
