"""The workloads of `fastgpt bench` as pytest-benchmark suites: one table each for prefill, decode and training.

    pytest benchmarks --prompt-tokens 512 --dtype bfloat16 --benchmark-json=out.json

Contenders run one after the other here; ratios that can be trusted come from `fastgpt bench`, which interleaves them.
"""

from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastgpt.bench import BenchmarkOptions
from fastgpt.bench.workloads import OURS, make_work

CONTENDERS = [OURS, "hf-eager", "hf-sdpa"]


class Suite:
    """Runs one workload of one contender under pytest-benchmark."""

    def __init__(self, base: GPT2LMHeadModel, ids: Tensor, options: BenchmarkOptions, dtype: torch.dtype):
        self.base, self.ids, self.options, self.dtype = base, ids, options, dtype

    def time(self, benchmark: BenchmarkFixture, workload: str, contender: str) -> None:
        work = make_work(workload, contender, self.base, self.ids, self.options.new_tokens, self.dtype)
        for _ in range(2):
            work.seconds()
        counted_s: list[float] = []
        benchmark.group = workload
        benchmark.pedantic(lambda: counted_s.append(work.seconds()), rounds=self.options.runs)
        benchmark.extra_info.update(
            tokens_per_s=work.n_tokens / median(counted_s),
            n_tokens=work.n_tokens,
            batch=self.options.batch,
            prompt_tokens=self.options.prompt_tokens,
            device=self.options.device,
            dtype=self.options.dtype,
        )


@pytest.fixture
def suite(base: GPT2LMHeadModel, ids: Tensor, options: BenchmarkOptions, dtype: torch.dtype) -> Suite:
    return Suite(base, ids, options, dtype)


@pytest.mark.usefixtures("inference_parity")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_prefill(benchmark: BenchmarkFixture, suite: Suite, contender: str) -> None:
    suite.time(benchmark, "prefill", contender)


@pytest.mark.usefixtures("inference_parity")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_decode(benchmark: BenchmarkFixture, suite: Suite, contender: str) -> None:
    suite.time(benchmark, "decode", contender)


@pytest.mark.usefixtures("training_parity")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_train(benchmark: BenchmarkFixture, suite: Suite, contender: str) -> None:
    suite.time(benchmark, "train", contender)
