"""Decode steps and choices of a token as cases: right ones agree, wrong ones are named, and each is timed alone."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from interpreter import DEVICE as DEVICE_NAME
from interpreter import only_interpreted
from interpreter.cooperative import cooperative_grid
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import steps
from fastgpt.bench import operations
from fastgpt.bench.operations import TINY

DEVICE, N_SLOTS = torch.device(DEVICE_NAME), 12
NAMES = [
    name for n in (1, 9) for name in (f"decode step, B={n}", *(f"choice, {kind}, B={n}" for kind in steps.CHOICES))
]


def all_cases(dtype: torch.dtype) -> dict[str, operations.Case]:
    return {case.operation: case for case in steps.cases(TINY["tiny"], (1, 9), N_SLOTS, DEVICE, dtype)}


def persistent(dtype: torch.dtype) -> operations.Case:
    return steps.persistent_case(replace(TINY["tiny"], n_embd=64, n_head=1), N_SLOTS, DEVICE, dtype)


def spoiled(case: operations.Case) -> operations.Case:
    """The same case, whose contender of fastgpt gives another last number."""
    right = case.contenders["fastgpt"]

    def wrong(*inputs: Tensor) -> Tensor:
        result = right(*inputs)
        result.view(-1)[-1] += 1 if result.dtype == torch.int64 else 100
        return result

    return replace(case, contenders=case.contenders | {"fastgpt": wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_steps_agree_with_the_reference(dtype: torch.dtype) -> None:
    cases = all_cases(dtype)
    assert list(cases) == NAMES
    assert {name: operations.check(case) for name, case in cases.items()} == dict.fromkeys(NAMES)


@only_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_persistent_step_agrees_with_the_reference(dtype: torch.dtype) -> None:
    with cooperative_grid(seed=0):
        assert operations.check(persistent(dtype)) is None


@only_interpreted
def test_the_persistent_step_packs_again_only_for_another_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    case, packed = persistent(torch.float32), []
    right = steps.PersistentDecoder
    monkeypatch.setattr(steps, "PersistentDecoder", lambda weights: packed.append(1) or right(weights))
    step = case.contenders["fastgpt"]
    with cooperative_grid(seed=0):
        for value, n_packed in ((64, 1), (64, 1), (32, 2)):
            monkeypatch.setattr(steps.persistent_tiles, "PERSISTENT_KEYS_PER_SPLIT", value)
            step(*case.inputs)
            assert len(packed) == n_packed


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("decode step, B=1", "decode step, B=1: result 0 errs by"),
        ("choice, top-k, B=9", "choice, top-k, B=9: 1 of 9 numbers of result 0 are not the reference's"),
    ],
)
def test_a_wrong_step_is_named(name: str, fault: str) -> None:
    assert str(operations.check(spoiled(all_cases(torch.float32)[name]))).startswith(fault)


def test_a_step_is_timed_as_it_is_replayed() -> None:
    case = all_cases(torch.float32)["decode step, B=1"]
    rows: list[dict[str, Any]] = operations.measure(case, {"bandwidth": 1e9, "matrix_rate": 1e9}, 0.0)
    assert [(row["contender"], row["direction"]) for row in rows] == [("fastgpt", "replay"), ("torch", "replay")]
    assert all(row["median_s"] > 0 for row in rows)
    cache, _, table, _, *others = case.inputs
    # The table is the head. Norms and biases are read too, and the last norm of (32,) is not counted.
    n_bytes = 4 * (cache.numel() + table.numel() + sum(x.numel() for x in others[:-2]))
    assert {row["bytes"] for row in rows} == {n_bytes}


class Capture(TorchDispatchMode):
    """Refuses operations that read a value on the host, which no CUDA graph can capture."""

    READING: ClassVar = torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else ()
        assert func.overloadpacket not in self.READING
        assert not any(index is not None and index.dtype == torch.bool for index in indices)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_bug_the_choices_of_the_reference_could_not_be_captured(name: str) -> None:
    case = all_cases(torch.float32)[name]
    with Capture():
        case.contenders["torch"](*case.inputs)


def test_a_capture_reads_nothing() -> None:
    for reads in (lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item()):
        with pytest.raises(AssertionError), Capture():
            reads(torch.ones(2))
