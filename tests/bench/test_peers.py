"""Peers run the same weights and are timed only where they agree; what is missing is left out with its reason."""

import copy
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from models import lively, token_ids
from paths import ROOT
from torch import Tensor
from transformers import GPT2LMHeadModel

from benchmarks.cpu import command as cpu
from benchmarks.peers import contenders as peers
from benchmarks.peers import cpu_engines as engines
from benchmarks.peers import llama_engines, openvino_engines, quantized_engines
from fastgpt import bench as benchmark
from fastgpt.accounting import Shape
from fastgpt.bench import BenchmarkOptions, operations, workloads
from fastgpt.bench.parity import ParityError

SHAPE = Shape(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=67)
OPTIONS = BenchmarkOptions(
    model="demo", prompt_tokens=12, new_tokens=4, runs=5, device="cpu", dtype="float32", baselines=["hf-sdpa"]
)


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips a test where an engine is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    return lively(workloads.load_base("demo")[0])


class Transformers:
    """The model itself as an engine, with an error to add to its logits."""

    n_bytes = 0

    def __init__(self, base: GPT2LMHeadModel, error: float = 0.0, wrong_token: bool = False):
        self.base, self.error, self.wrong_token = base, error, wrong_token

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.base(ids, use_cache=False).logits + self.error

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        tokens = self.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens)  # type: ignore[operator]
        return tokens[:, ids.shape[1] :] + self.wrong_token, [0.0, 1.0]

    def seconds(self, workload: str, ids: Tensor, n_tokens: int) -> float:
        return 1.0

    def peak_growth(self, workload: str, ids: Tensor, n_tokens: int) -> tuple[int, str]:
        return 12_345, "counted elsewhere"


# --- engines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(engines.CTranslate2, marks=needs("ctranslate2")),
        pytest.param(engines.OnnxRuntime, marks=needs("onnxruntime", "onnxscript")),
        pytest.param(openvino_engines.OpenVino, marks=needs("openvino")),
    ],
)
@pytest.mark.parametrize("n_batch", [1, 3])
def test_engine_gives_the_results_of_transformers(base: GPT2LMHeadModel, build: Any, n_batch: int) -> None:
    ids = token_ids(n_batch, 9, base.config.vocab_size)
    engine = build(base, n_batch, 2)
    peers.check_engine(engine, base, ids, 12)
    times = engine.generate(ids, 12)[1]
    assert len(times) == 12
    assert times == sorted(times)
    assert times[0] > 0
    assert engine.n_bytes >= sum(p.nbytes for p in base.parameters())


@pytest.mark.parametrize(
    ("build", "allowed"),
    [
        pytest.param(quantized_engines.CTranslate2Int8, peers.MAX_INT8_ERROR, marks=needs("ctranslate2")),
        pytest.param(quantized_engines.OnnxRuntimeInt8, peers.MAX_INT8_ERROR, marks=needs("onnxruntime", "onnxscript")),
        pytest.param(quantized_engines.OnnxRuntime8Bit, peers.MAX_INT8_ERROR, marks=needs("onnxruntime", "onnxscript")),
        pytest.param(openvino_engines.OpenVinoInt8, peers.MAX_INT8_ERROR, marks=needs("openvino")),
        pytest.param(llama_engines.LlamaCppQ8, peers.MAX_INT8_ERROR, marks=needs("llama_cpp")),
        pytest.param(llama_engines.LlamaCppQ4, peers.MAX_INT4_ERROR, marks=needs("llama_cpp")),
    ],
)
def test_engines_with_rounded_weights_are_accurate(base: GPT2LMHeadModel, build: Any, allowed: float) -> None:
    ids = token_ids(2, 9, base.config.vocab_size)
    engine = build(copy.deepcopy(base), 2, 1)
    assert peers.accuracy_of(engine.logits(ids), base, ids, allowed)["logit_error"] > 0
    assert engine.generate(ids, 4)[0].shape == (2, 4)
    assert engine.n_bytes < 0.6 * sum(p.nbytes for p in base.parameters())


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(openvino_engines.OpenVinoBFloat16, marks=needs("openvino")),
        pytest.param(llama_engines.LlamaCppBFloat16, marks=needs("llama_cpp")),
    ],
)
def test_engines_in_bfloat16_are_as_accurate_as_it_is(base: GPT2LMHeadModel, build: Any) -> None:
    ids = token_ids(2, 9, base.config.vocab_size)
    engine = build(copy.deepcopy(base), 2, 1)
    error = peers.accuracy_of(engine.logits(ids), base, ids, peers.MAX_BFLOAT16_ERROR)["logit_error"]
    assert error > 1e-3
    assert engine.generate(ids, 4)[0].shape == (2, 4)


@needs("llama_cpp")
@pytest.mark.parametrize("n_batch", [1, 3])
def test_llama_cpp_rounds_only_its_gelu(base: GPT2LMHeadModel, n_batch: int) -> None:
    ids = token_ids(n_batch, 9, base.config.vocab_size)
    engine = llama_engines.LlamaCpp(base, n_batch, 2)
    peers.accuracy_of(engine.logits(ids), base, ids, peers.MAX_TABLE_ERROR)
    tokens, times = engine.generate(ids, 12)
    assert torch.equal(tokens, Transformers(base).generate(ids, 12)[0])
    assert len(times) == 12
    assert times == sorted(times)
    peers.accuracy_of(engine.logits(ids), base, ids, peers.MAX_TABLE_ERROR)  # Nothing is left of the call before.


@needs("ctranslate2")
def test_an_engine_lives_in_a_process_of_its_own(base: GPT2LMHeadModel) -> None:
    ids = token_ids(2, 9, base.config.vocab_size)
    engine = engines.Remote(engines.CTranslate2, base, 2)
    try:
        peers.check_engine(engine, base, ids, 4)
        assert engine.n_bytes >= sum(p.nbytes for p in base.parameters())
        for workload in ("prefill", "decode"):
            assert engine.seconds(workload, ids, 4) > 0
            assert engine.peak_growth(workload, ids, 4)[1] in ("resident set growth", "n/a")
    finally:
        engine.close()


@needs("openvino")
@pytest.mark.parametrize("build", [openvino_engines.OpenVino, openvino_engines.OpenVinoInt8])
def test_openvino_begins_each_call_without_a_past(base: GPT2LMHeadModel, build: Any) -> None:
    first, second = token_ids(2, 9, base.config.vocab_size), token_ids(2, 5, base.config.vocab_size)
    engine = build(copy.deepcopy(base), 2, 1)
    logits, (tokens, _) = engine.logits(first), engine.generate(first, 4)
    engine.logits(second)
    assert torch.equal(engine.logits(first), logits)
    assert torch.equal(engine.generate(first, 4)[0], tokens)


@needs("ctranslate2", "llama_cpp", "onnxruntime", "onnxscript", "openvino")
def test_no_engine_is_loaded_beside_torch() -> None:
    """ctranslate2 in this process would slow torch down, and so every contender."""
    script = (
        "import sys, torch\n"
        "from benchmarks.peers import contenders as peers\n"
        "from fastgpt.bench import workloads\n"
        "if __name__ == '__main__':\n"
        "    base = workloads.load_base('demo')[0]\n"
        "    ids = torch.arange(9)[None]\n"
        "    for name, make in peers.CPU_PEERS.items():\n"
        "        assert make('prefill', base, ids, 4, torch.float32).seconds() > 0\n"
        "    print({'ctranslate2', 'llama_cpp', 'onnxruntime', 'openvino'} & set(sys.modules))\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.stdout == "set()\n", finished.stderr


def test_gate_is_red_on_wrong_logits_and_on_wrong_tokens(base: GPT2LMHeadModel) -> None:
    ids = token_ids(2, 9, base.config.vocab_size)
    peers.check_engine(Transformers(base), base, ids, 4)
    with pytest.raises(ParityError, match="logits differ"):
        peers.check_engine(Transformers(base, error=0.1), base, ids, 4)
    with pytest.raises(ParityError, match="greedy tokens"):
        peers.check_engine(Transformers(base, wrong_token=True), base, ids, 4)


def test_the_gate_of_int8_is_red_on_another_model(base: GPT2LMHeadModel) -> None:
    ids = token_ids(2, 9, base.config.vocab_size)
    logits = Transformers(base).logits(ids)
    assert peers.accuracy_of(logits, base, ids, 0.1) == {"logit_error": 0.0, "kl_divergence": 0.0}
    noise = 0.01 * torch.randn(logits.shape) * (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()
    accuracy = peers.accuracy_of(logits + noise, base, ids, 0.1)
    assert accuracy["logit_error"] == pytest.approx(0.01, rel=0.1)
    assert 0 < accuracy["kl_divergence"] < 0.01
    with pytest.raises(ParityError, match="of their spread"):
        peers.accuracy_of(logits.roll(1, 1), base, ids, 0.1)


@pytest.mark.parametrize("workload", ["prefill", "decode"])
def test_fastgpt_with_rounded_weights_is_a_contender(base: GPT2LMHeadModel, workload: str) -> None:
    ids = token_ids(1, 9, base.config.vocab_size)
    works = [make(workload, base, ids, 4, torch.float32) for make in peers.OUR_QUANTIZED.values()]
    assert works[0].held_bytes() > works[1].held_bytes() - 2 * base.lm_head.weight.numel() > 0
    assert works[1].held_bytes() == works[2].held_bytes() > works[3].held_bytes()
    for work in works:
        assert work.seconds() > 0
    assert all(0 < work.accuracy["logit_error"] < peers.MAX_INT8_ERROR for work in works[:3])
    assert peers.MAX_INT8_ERROR < works[3].accuracy["logit_error"] < peers.MAX_INT4_ERROR


def test_int8_is_compared_with_int8() -> None:
    taken = {"fastgpt": 5.0, "fastgpt-int8": 2.0, "fastgpt-int8-head": 1.0, "ctranslate2-int8": 3.0, "ctranslate2": 9.0}
    rows = [{"workload": "decode", "contender": name, "samples_s": [s] * 5} for name, s in taken.items()]
    found = {(row["contender"], row["baseline"]): row["paired"]["median"] for row in cpu.quantized_ratios(rows)}
    assert found == {("fastgpt-int8", "ctranslate2-int8"): 1.5, ("fastgpt-int8-head", "ctranslate2-int8"): 3.0}


def test_peers_are_timed_or_left_out_with_a_reason() -> None:
    contenders = {
        "sound": peers._contender(lambda base, n_batch: Transformers(base)),  # type: ignore[arg-type]
        "wrong": peers._contender(lambda base, n_batch: Transformers(base, error=0.1)),  # type: ignore[arg-type]
        "missing": peers._contender(lambda base, n_batch: __import__("no_such_engine")),  # type: ignore[arg-type]
    }
    result = benchmark.run_benchmark(OPTIONS, peers=contenders)
    timed = {(row["workload"], row["contender"]) for row in result["results"]}
    assert timed == {(w, name) for w in ("prefill", "decode") for name in ("fastgpt", "hf-sdpa", "sound")}
    assert {(row["workload"], row["baseline"]) for row in result["ratios"]} == timed - {
        (workload, "fastgpt") for workload in ("prefill", "decode")
    }
    reasons = {row["baseline"]: row["reason"] for row in result["skipped"]}
    sound = [row for row in result["results"] if row["contender"] == "sound"]
    assert {(row["peak_memory_bytes"], row["memory_measure"]) for row in sound} == {(12_345, "counted elsewhere")}
    assert reasons["wrong"].startswith("ParityError: its logits differ")
    assert reasons["missing"] == "ModuleNotFoundError: No module named 'no_such_engine'"


def test_engines_are_left_out_of_what_they_do_not_do(base: GPT2LMHeadModel) -> None:
    ids = token_ids(1, 9, base.config.vocab_size)
    make = peers.CPU_PEERS["ctranslate2"]
    for workload, dtype in (("train", torch.float32), ("prefill", torch.bfloat16)):
        with pytest.raises(ValueError, match="only on a CPU, in float32"):
            make(workload, base, ids, 4, dtype)


def test_command_writes_a_result(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    command = [sys.executable, "-m", "benchmarks", "cpu", "--model", "demo", "--out", str(file), "--runs", "5"]
    command += ["--workload", "prefill", "--prompt-tokens", "8", "--baselines", "hf-sdpa", "--peers", "ctranslate2"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(file.read_text())
    contenders = {row["contender"] for row in result["results"]} | {row["baseline"] for row in result["skipped"]}
    assert contenders == {"fastgpt", "hf-sdpa", "ctranslate2"}
    assert "fastgpt" in finished.stdout


def test_unknown_peer_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="unknown peer 'llama'"):
        cpu.main(out=tmp_path / "peers.json", peers="llama")


# --- operations -----------------------------------------------------------------------------------------------------


def loss_case() -> operations.Case:
    found = operations.cases(SHAPE, 2, 9, torch.device("cpu"), torch.float32)
    return next(case for case in found if case.operation == "linear_cross_entropy")


def attention_case() -> operations.Case:
    found = operations.cases(SHAPE, 2, 9, torch.device("cpu"), torch.float32)
    return next(case for case in found if case.operation == "causal_attention")


def test_operation_peers_that_are_not_installed_are_named() -> None:
    case, left_out = peers.with_peers(loss_case(), SHAPE)
    missing = {row["contender"] for row in left_out}
    assert missing | set(case.contenders) >= set(peers.OPERATION_PEERS["linear_cross_entropy"])
    for row in left_out:
        assert row["operation"] == "linear_cross_entropy"
        assert row["skipped"]


def test_operation_peer_runs_where_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("cut_cross_entropy")
    package.linear_cross_entropy = lambda x, weight, labels: F.cross_entropy(x @ weight.t(), labels)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
    case, _ = peers.with_peers(loss_case(), SHAPE)
    assert "cut-cross-entropy" in case.contenders
    rows = operations.measure(case, {"bandwidth": 1e9, "matrix_rate": 1e9}, 0.0)
    assert {row["direction"] for row in rows if row["contender"] == "cut-cross-entropy" and "median_s" in row} == {
        "forward",
        "forward+backward",
    }

    package.linear_cross_entropy = lambda x, weight, labels: 1.01 * F.cross_entropy(x @ weight.t(), labels)
    case, left_out = peers.with_peers(loss_case(), SHAPE)
    assert "cut-cross-entropy" not in case.contenders
    assert "errs by" in next(row["skipped"] for row in left_out if row["contender"] == "cut-cross-entropy")


@pytest.mark.parametrize("returns_more", [False, True])
def test_attention_peer_reads_packed_qkv(monkeypatch: pytest.MonkeyPatch, returns_more: bool) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        return (out, None) if returns_more else out

    package: Any = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    case, _ = peers.with_peers(attention_case(), SHAPE)
    assert "flash-attn 2" in case.contenders
