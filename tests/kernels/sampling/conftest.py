"""Fixtures of the tests of sampling."""

import pytest
from fastgpt_kernels.operations.sampling import tiles


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SAMPLING_GROUPS", 4)
    monkeypatch.setattr(tiles, "SAMPLING_CHOICE_BLOCK", 256)
    monkeypatch.setattr(tiles, "SAMPLING_FILTER_LANES", 64)
    monkeypatch.setattr(tiles, "SAMPLING_WAYS", 16)
