"""The parity gate of the benchmark goes red for a wrong model, before anything is timed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastgpt_kernels import reference
from torch import Tensor

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


# --- the limits -----------------------------------------------------------------------------------------------------


class Says:
    """In place of a model: one row of logits (V,) after every token, and the tokens that it continues with."""

    def __init__(self, dtype: torch.dtype, logits: list[float], tokens: list[int]):
        self.dtype, self.logits, self.tokens = dtype, torch.tensor(logits), tokens

    def __call__(self, ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))

    def generate(self, ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([ids, torch.tensor([self.tokens]).expand(len(ids), -1)], 1)


@pytest.mark.parametrize(("knows_truth", "share", "passes"), [(k, s, s < 1) for k in (True, False) for s in (0.9, 1.1)])
def test_logits_may_err_as_much_as_the_gate_says(
    knows_truth: bool, share: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as much as transformers' and one ulp of the largest, 256; without the truth 64 ulps."""
    ids, ulp, their_error = torch.zeros(1, 2, dtype=torch.int64), 2.0**-15, 2.0**-10
    allowed = 2 * their_error + ulp if knows_truth else 64 * ulp
    truth = torch.tensor([256.0, 1.0], dtype=torch.float64).expand(1, 2, -1)
    monkeypatch.setattr(parity, "_truth", lambda base, ids: truth if knows_truth else None)
    theirs = Says(torch.float32, [256.0, 1 + their_error if knows_truth else 1.0], [])
    ours: Any = Says(torch.float32, [256.0, 1 + share * allowed], [])
    if passes:
        assert parity._check_logits(ours, theirs, None, ids)["allowed"] == allowed  # type: ignore[arg-type]
    else:
        with pytest.raises(ParityError, match="error against float64" if knows_truth else "difference from"):
            parity._check_logits(ours, theirs, None, ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "gap", "passes"),
    [
        (torch.float32, 0.0, False),
        (torch.bfloat16, 0.0, True),
        (torch.bfloat16, 0.5, True),
        (torch.bfloat16, 0.6, False),
    ],
)
def test_greedy_tokens_differ_in_half_precision_alone_and_where_logits_tie(
    dtype: torch.dtype, gap: float, passes: bool
) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    theirs: Any = Says(dtype, [1.0, 1.0 - gap, 0.0], [0, 0, 0, 0])
    ours: Any = Says(dtype, [1.0, 1.0 - gap, 0.0], [0, 1, 2, 2])
    if passes:
        found = parity._check_greedy(ours, theirs, ids, 4, tie=0.5)
        assert found == {"greedy_tokens": 2 * 4, "greedy_tokens_equal": 2 * 1}
    else:
        with pytest.raises(ParityError, match="greedy token 1 of sequence 0 is 1, transformers' 0"):
            parity._check_greedy(ours, theirs, ids, 4, tie=0.5)
