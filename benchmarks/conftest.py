"""What the suite of the operations runs on, as options of pytest."""

from typing import Any

import pytest

from fastgpt.bench import BenchmarkOptions
from fastgpt.load import DTYPES


def pytest_addoption(parser: pytest.Parser) -> None:
    defaults = BenchmarkOptions()
    group = parser.getgroup("fastgpt")
    group.addoption("--sizes", default=None, help="tiny or presets, comma-separated")
    group.addoption("--batch", type=int, default=defaults.batch, help="sequences at a time, for the presets")
    group.addoption("--prompt-tokens", type=int, default=defaults.prompt_tokens, help="tokens of each, for the presets")
    group.addoption("--device", default=None, help="cpu or cuda; the GPU when there is one")
    group.addoption("--dtype", default=None, help=", ".join(DTYPES))
    group.addoption("--runs", type=int, default=defaults.runs, help="timed runs of each contender")


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> BenchmarkOptions:
    names = ("batch", "prompt_tokens", "device", "dtype", "runs")
    values: dict[str, Any] = {name: request.config.getoption(name) for name in names}
    return BenchmarkOptions(**values)
