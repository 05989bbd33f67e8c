"""The parity gate of the benchmark goes red for a wrong model, before anything is timed."""

from typing import Any

import pytest
import torch
from fastgpt_kernels import reference

from fastgpt import generate as engine
from fastgpt.bench import BenchmarkOptions, ParityError, machine, parity, run_benchmark, workloads

SMALL: dict[str, Any] = {"prompt_tokens": 12, "new_tokens": 8, "batch": 2, "device": "cpu"}


def slightly_wrong(operation: str, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    right = getattr(reference, operation)
    monkeypatch.setattr(reference, operation, lambda *args, **kwargs: change(args, right(*args, **kwargs)))


def scaled(args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out * 1.001


def with_a_nan(args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out + torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("operation", "change", "workload", "message"),
    [
        ("gelu_mlp", scaled, "prefill", r"logits' error against float64 is [\d.e-]+, allowed"),
        ("gelu_mlp", with_a_nan, "prefill", "logits' error against float64 is nan"),
        ("linear_cross_entropy", scaled, "train", "loss of a training step differs"),
        ("gelu_mlp", scaled, "train", "gradient of a training step differs|loss of a training step differs"),
    ],
)
def test_red_gate_stops_before_anything_is_timed(
    directory: str, monkeypatch: pytest.MonkeyPatch, operation: str, change: Any, workload: str, message: str
) -> None:
    timed = []
    monkeypatch.setattr(workloads, "make_work", lambda *args: timed.append(args))
    monkeypatch.setattr(machine, "measure_rates", lambda *args: timed.append(args))
    slightly_wrong(operation, monkeypatch, change)
    with pytest.raises(ParityError, match=message):
        run_benchmark(BenchmarkOptions(model=directory, workloads=workload, dtype="float32", **SMALL))
    assert not timed


def test_red_gate_of_the_decode_step(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = engine.decode_one_token
    monkeypatch.setattr(engine.host_loop, "decode_one_token", lambda *args: -decode(*args))
    with pytest.raises(ParityError, match=r"greedy token \d+ of sequence \d is \d+"):
        run_benchmark(BenchmarkOptions(model=directory, workloads="decode", dtype="float32", **SMALL))


def test_gate_without_truth_compares_with_transformers(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_CHEAP_FLOPS", 0)
    base, _ = workloads.load_base(directory)
    ids = torch.arange(24).view(2, 12)
    report = parity.check_inference(base, ids, 4, torch.float32)
    assert "logit_error" not in report
    assert report["logit_difference"] <= report["allowed"]
    slightly_wrong("gelu_mlp", monkeypatch, scaled)
    with pytest.raises(ParityError, match="difference from transformers"):
        parity.check_inference(base, ids, 4, torch.float32)


@pytest.mark.parametrize("workload", workloads.WORKLOADS)
def test_bfloat16_passes_the_gate_and_a_wrong_model_does_not(
    directory: str, monkeypatch: pytest.MonkeyPatch, workload: str
) -> None:
    base, _ = workloads.load_base(directory)
    ids = torch.arange(24).view(2, 12)

    def check() -> None:
        if workload == "train":
            parity.check_training(base, ids, torch.bfloat16)
        else:
            parity.check_inference(base, ids, 8, torch.bfloat16)

    check()
    slightly_wrong("gelu_mlp", monkeypatch, lambda args, out: out * 1.3)
    with pytest.raises(ParityError):
        check()
