"""Generation on each backend, and the engine's log, which says where a call went."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

import fastgpt


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastgpt.backend(request.param):
        yield request.param


@pytest.fixture
def route(caplog) -> Any:
    """A function that says where the calls since its last use went."""
    caplog.set_level(logging.DEBUG, logger="fastgpt")

    def messages() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "fastgpt"]
        caplog.clear()
        return found

    return messages
