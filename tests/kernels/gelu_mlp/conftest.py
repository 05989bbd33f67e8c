"""Fixtures of the tests of gelu_mlp."""

import pytest

from .formula import several_programs


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a small tensor."""
    several_programs(monkeypatch)
