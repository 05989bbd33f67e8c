"""What the suites run on, as options of pytest, and the parity gate before the first timing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastgpt import accounting
from fastgpt.bench import BenchmarkOptions, make_tokens, parity, workloads
from fastgpt.load import DTYPES


def pytest_addoption(parser: pytest.Parser) -> None:
    defaults = BenchmarkOptions()
    group = parser.getgroup("fastgpt")
    group.addoption("--model", default=defaults.model, help="demo, a preset's name, a directory, or a Hub id")
    group.addoption("--random-weights", action="store_true", help="take only the configuration")
    group.addoption("--batch", type=int, default=defaults.batch, help="sequences at a time")
    group.addoption("--prompt-tokens", type=int, default=defaults.prompt_tokens, help="tokens of each sequence")
    group.addoption("--new-tokens", type=int, default=defaults.new_tokens, help="tokens that decode makes")
    group.addoption("--device", default=None, help="cpu or cuda; the GPU when there is one")
    group.addoption("--dtype", default=None, help=", ".join(DTYPES))
    group.addoption("--sizes", default=None, help="of operations: tiny or presets, comma-separated")
    group.addoption("--runs", type=int, default=defaults.runs, help="timed runs of each contender")


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> BenchmarkOptions:
    names = ("model", "random_weights", "batch", "prompt_tokens", "new_tokens", "device", "dtype", "runs")
    values: dict[str, Any] = {name: request.config.getoption(name) for name in names}
    return BenchmarkOptions(**values)


@pytest.fixture(scope="session")
def dtype(options: BenchmarkOptions) -> torch.dtype:
    return DTYPES[str(options.dtype)]


@pytest.fixture(scope="session")
def base(options: BenchmarkOptions) -> GPT2LMHeadModel:
    return workloads.load_base(options.model, random_weights=options.random_weights, seed=options.seed)[0]


@pytest.fixture(scope="session")
def ids(options: BenchmarkOptions, base: GPT2LMHeadModel) -> Tensor:
    return make_tokens(options, accounting.shape_of(base)).to(str(options.device))


@pytest.fixture(scope="session")
def inference_parity(base: GPT2LMHeadModel, ids: Tensor, options: BenchmarkOptions, dtype: torch.dtype) -> dict:
    return parity.check_inference(base, ids, options.new_tokens, dtype)


@pytest.fixture(scope="session")
def training_parity(base: GPT2LMHeadModel, ids: Tensor, dtype: torch.dtype) -> dict:
    return parity.check_training(base, ids, dtype)
