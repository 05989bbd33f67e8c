"""The operations as pytest-benchmark suites: one table for each operation, size and pass.

    pytest benchmarks/operations/test_operations.py --sizes gpt2,gpt2-xl --batch 16 --prompt-tokens 1024

Without a GPU the size is tiny unless it is given, and fastgpt runs the reference, as it does there for anyone. Every
operation is checked before it is timed.
"""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastgpt.accounting import PRESETS, Shape
from fastgpt.bench import BenchmarkOptions, machine, operations
from fastgpt.bench.operations import TINY
from fastgpt.load import DTYPES, default_device

SHAPES: dict[str, Shape] = {**TINY, **PRESETS}
DIRECTIONS = ("forward", "backward", "forward+backward")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each size, operation, contender and pass; an operation's inputs are made once for all of them."""
    device = torch.device(metafunc.config.getoption("--device") or default_device())
    sizes = metafunc.config.getoption("--sizes") or ("gpt2" if device.type == "cuda" else "tiny")
    if unknown := set(sizes.split(",")) - set(SHAPES):
        raise pytest.UsageError(f"unknown size {min(unknown)!r}: give some of {', '.join(SHAPES)}")
    contenders = {case.operation: list(case.contenders) for case in _cases("tiny", 2, 17, device, torch.float32)}
    values = []
    for size in sizes.split(","):
        for operation in contenders:
            place = (size, operation)
            values += [pytest.param(place, name, id=f"{size}-{operation}-{name}") for name in contenders[operation]]
    metafunc.parametrize(("case", "contender"), values, indirect=["case"], scope="module")
    metafunc.parametrize("direction", DIRECTIONS)


def _cases(
    size: str, n_batch: int, n_tokens: int, device: torch.device, dtype: torch.dtype
) -> Iterator[operations.Case]:
    return operations.cases(SHAPES[size], n_batch, n_tokens, device, dtype)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, options: BenchmarkOptions) -> operations.Case:
    """One operation at one size, found to be right."""
    size, operation = request.param
    n_batch, n_tokens = (2, 17) if size == "tiny" else (options.batch, options.prompt_tokens)
    place = torch.device(str(options.device)), DTYPES[str(options.dtype)]
    found = next(case for case in _cases(size, n_batch, n_tokens, *place) if case.operation == operation)
    if fault := operations.check(found):
        pytest.fail(f"{fault}: nothing was timed")
    return found


def test_operation(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    case: operations.Case,
    contender: str,
    direction: str,
    options: BenchmarkOptions,
) -> None:
    call = operations.make_call(case.contenders[contender], case.inputs, direction)
    device = case.inputs[0].device

    def run() -> None:
        call()
        machine.synchronize(device)

    benchmark.group = f"{case.operation}, {request.node.callspec.params['case'][0]}, {direction}"
    benchmark.pedantic(run, rounds=options.runs, warmup_rounds=2)
    passes = {"forward": [case.forward], "backward": [case.backward]}.get(direction, [case.forward, case.backward])
    n_bytes, n_flops = (sum(amounts) for amounts in zip(*passes, strict=True))
    benchmark.extra_info.update(bytes=n_bytes, flops=n_flops, device=options.device, dtype=options.dtype)
