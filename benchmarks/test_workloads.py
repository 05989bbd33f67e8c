"""The workloads of `fastgpt bench` as pytest-benchmark suites: one table each for prefill, decode and training.

    pytest benchmarks --prompt-tokens 512 --dtype bfloat16 --benchmark-json=out.json

Contenders run one after the other here; ratios that can be trusted come from `fastgpt bench`, which interleaves them.
"""

from collections.abc import Callable
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastgpt.bench import BenchmarkOptions
from fastgpt.bench.workloads import OURS, make_work

CONTENDERS = [OURS, "hf-eager", "hf-sdpa"]


# Times one workload of one contender, by their names.
Time = Callable[[str, str], None]


@pytest.fixture
def time(
    benchmark: BenchmarkFixture, base: GPT2LMHeadModel, ids: Tensor, options: BenchmarkOptions, dtype: torch.dtype
) -> Time:
    def run(workload: str, contender: str) -> None:
        work = make_work(workload, contender, base, ids, options.new_tokens, dtype)
        for _ in range(2):
            work.seconds()
        counted_s: list[float] = []
        benchmark.group = workload
        benchmark.pedantic(lambda: counted_s.append(work.seconds()), rounds=options.runs)
        benchmark.extra_info.update(
            tokens_per_s=work.n_tokens / median(counted_s),
            n_tokens=work.n_tokens,
            batch=options.batch,
            prompt_tokens=options.prompt_tokens,
            device=options.device,
            dtype=options.dtype,
        )

    return run


@pytest.mark.usefixtures("inference_parity")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_prefill(time: Time, contender: str) -> None:
    time("prefill", contender)


@pytest.mark.usefixtures("inference_parity")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_decode(time: Time, contender: str) -> None:
    time("decode", contender)


@pytest.mark.usefixtures("training_parity")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_train(time: Time, contender: str) -> None:
    time("train", contender)
