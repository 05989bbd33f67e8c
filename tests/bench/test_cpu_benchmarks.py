"""The CPU's benchmarks beside `fastgpt bench`: curves, what prompt lookup gains, and Python's time per token."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastgpt_kernels
import pytest
import torch
from compilers import needs_launcher
from paths import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.cpu import host, lookup, memory, traffic
from benchmarks.report import records, tables
from fastgpt import accounting
from fastgpt import generate as engine
from fastgpt.bench import machine, workloads
from fastgpt.bench.parity import ParityError
from fastgpt.generate import device_loop, prompt_graphs


def run(module: str, file: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a command wrote to its file and printed."""
    command = [sys.executable, "-m", "benchmarks", module, "--out", str(file), "--model", "demo", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(file.read_text()), finished.stdout


def test_curves_of_memory_and_latency(tmp_path: Path) -> None:
    arguments = "--batches", "2", "--contexts", "8,16", "--prompt-tokens", "8"
    result, output = run("curves", tmp_path / "curves.json", *arguments)
    memory, latency = (records.curve(result, kind)["demo"] for kind in ("memory", "latency"))
    assert {(row["workload"], row["batch"]) for row in memory} == {("prefill", 2), ("train", 2)}
    assert {(row["contender"], row["context"]) for row in latency} == {
        (name, context) for name in ("fastgpt", "hf-sdpa") for context in (8, 16)
    }
    assert "**Peak memory of demo**" in output
    assert "**Time of a token of demo**" in output


@pytest.mark.parametrize("name", ["fastgpt", "hf-sdpa"])
@pytest.mark.parametrize("workload", ["prefill", "train"])
def test_counted_memory_is_that_of_a_run(workload: str, name: str) -> None:
    base, _ = workloads.load_base("demo")
    ids = torch.arange(200).view(2, 100)
    counted = memory.peak(workload, name, base, ids, torch.float32)["peak_memory_bytes"]
    work = workloads.make_work(workload, name, base, ids, 1, torch.float32)
    work.run()
    growth, _ = machine.peak_growth(work.run, ids.device)
    assert counted == pytest.approx(work.held_bytes() + growth, rel=0.005)


def test_traffic_of_a_step() -> None:
    """Some of it can be said without counting."""
    n_batch, n_tokens = 2, 64
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=500, n_positions=64)
    ours, theirs = (
        {row["source"]: row for row in traffic.count(name, config, n_batch, n_tokens)}
        for name in ("fastgpt", "hf-sdpa")
    )
    n_parameters = sum(parameter.numel() for parameter in GPT2LMHeadModel(config).parameters())
    n_elements = n_batch * n_tokens * 64
    for rows in (ours, theirs):
        assert rows["_fused_adamw_"]["bytes"] == pytest.approx(accounting.adamw_bytes(n_parameters), rel=0.2)
    qkv_and_out, statistics = 4 * 2 * n_elements, 2 * 4 * n_batch * n_tokens * 2  # maximum and sum of each head's row
    assert ours["causal_attention_fwd_kernel"]["bytes"] == 2 * (qkv_and_out + statistics)
    assert ours["causal_attention_fwd_kernel"]["calls"] == 2
    assert theirs["native_layer_norm"]["calls"] == 5
    assert not any("layer_norm" in source for source in ours if "kernel" not in source)
    # Of the embeddings, and of the two gradients of the tied one: the stream's gradients are added by the norms.
    assert ours["add"]["bytes"] < 4 * (3 * n_elements + 3 * 500 * 64 + n_elements)
    assert sum(row["bytes"] for row in ours.values()) < 0.6 * sum(row["bytes"] for row in theirs.values())


@pytest.fixture
def one_short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "TEXTS", {"short": ("ROMEO: I, I, I, I", 12, {"do_sample": False})})
    monkeypatch.setattr(lookup, "N_PROPOSED", (0, 3))


def no_progress(what: str, n_done: int, n_steps: int) -> None:
    pass


def test_lookup_is_timed_with_and_without(one_short_text: None) -> None:
    plain, looked_up = lookup.measure_texts(torch.float32, 5, no_progress)
    assert (plain["proposed"], looked_up["proposed"]) == (0, 3)
    assert plain["tokens_per_forward"] == 1 <= looked_up["tokens_per_forward"]
    assert plain["equal_tokens"] == looked_up["equal_tokens"] == 12
    assert len(looked_up["samples_s"]) == 5
    gain = looked_up["tokens_per_s"]["median"] / plain["tokens_per_s"]["median"]
    assert f"| short | float32 | 3 | {plain['tokens_per_s']['median']:,.0f} |" in tables._lookup_table(
        [plain, looked_up]
    )
    assert f"| {gain:.2f}x |" in tables._lookup_table([plain, looked_up])


def test_lookup_that_changes_tokens_has_no_figure(one_short_text: None, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = engine.decode_tokens
    monkeypatch.setattr(engine, "decode_tokens", lambda *call: -decode(*call))
    with pytest.raises(ParityError, match="is another one with 3 proposed tokens"):
        lookup.measure_texts(torch.float32, 5, no_progress)


def test_forwards_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "TOKENS_OF_A_FORWARD", (1, 3))
    rows = lookup.measure_forwards("demo", torch.bfloat16, 16, 5)
    assert [(row["tokens"], row["context"], len(row["samples_s"])) for row in rows] == [(1, 16, 5), (3, 16, 5)]


def test_host_time_is_that_of_the_engine_on_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[type] = set()
    iterate = device_loop.DeviceGeneration.__iter__

    def note(self: device_loop.DeviceGeneration) -> Any:
        taken.add(type(self))
        return iterate(self)

    monkeypatch.setattr(device_loop.DeviceGeneration, "__iter__", note)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    # In the interpreter, forwards of 64 prompts would take long.
    monkeypatch.setattr(prompt_graphs, "forward_prompt", lambda model, cache, ids, *rest: torch.zeros(len(ids), 67))
    host.main(tmp_path / "host.json", tokens=40, rounds=1, layers=1)
    content = json.loads((tmp_path / "host.json").read_text())
    first, figures = content["us_to_first_token"], content["us_per_token"]
    assert 0 < first["prompt in a graph"] < first["prompt launched"]
    assert set(figures) == {f"{name}, batch {n}" for name in host.CALLS for n in (1, 8, 64)}
    assert taken == {device_loop.DeviceGeneration}


@needs_launcher
def test_host_time_of_operations_and_models(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    command = [sys.executable, "-m", "benchmarks", "launches", "--out", str(file), "--calls", "20", "--rounds", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(file.read_text())["us"]
    assert set(figures) == {*fastgpt_kernels.OPERATIONS, "transformers sdpa", "fastgpt kernels", "fastgpt torch"}
    assert all(row["forward+backward"] > row["forward"] > 0 for row in figures.values())
