"""The benchmark: figures that follow from their samples, contenders with the same weights, files that can be read."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from models import pair, tiny_config
from rich.console import Console
from torch import Tensor
from transformers import GPT2LMHeadModel

import fastgpt
from fastgpt import accounting
from fastgpt import bench as benchmark
from fastgpt.bench import BenchmarkOptions, machine, plotting, profiling, run_benchmark, workloads

SMALL: dict[str, Any] = {"prompt_tokens": 12, "new_tokens": 8, "batch": 2, "runs": 5, "device": "cpu"}


@pytest.fixture(scope="module")
def result(directory: str) -> dict[str, Any]:
    return run_benchmark(BenchmarkOptions(model=directory, workloads=workloads.WORKLOADS, dtype="float32", **SMALL))


def rows(result: dict[str, Any], workload: str) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in result["results"] if row["workload"] == workload}


# --- figures --------------------------------------------------------------------------------------------------------


def test_result_survives_json_and_says_what_it_was_measured_on(result: dict[str, Any]) -> None:
    read = json.loads(json.dumps(result, allow_nan=False))
    assert read["schema"] == 2
    assert read["path"] == "torch"
    assert read["model"]["weights"] == "loaded"
    assert read["model"]["dropout"] == {"embd": 0.0, "attn": 0.0, "resid": 0.1}
    assert read["machine"]["cpu"]
    assert read["machine"]["threads"] == torch.get_num_threads()
    assert read["versions"]["torch"] == torch.__version__
    assert {"fastgpt", "transformers", "triton", "python"} <= read["versions"].keys()
    assert read["options"]["prompt_tokens"] == 12
    assert read["rates"]["bandwidth"] > 1e8
    assert read["rates"]["matrix_rate"] > 1e8


@pytest.mark.parametrize(("workload", "n_tokens"), [("prefill", 2 * 12), ("decode", 2 * 7), ("train", 2 * 12)])
def test_speed_follows_from_samples(result: dict[str, Any], workload: str, n_tokens: int) -> None:
    shape = accounting.Shape(n_layer=2, n_embd=64, n_head=4, n_positions=48, vocab_size=131)
    ceiling = {
        "prefill": accounting.prefill_ceiling(shape, result["rates"]["matrix_rate"], 12),
        "decode": accounting.decode_ceiling(shape, result["rates"]["bandwidth"], 2, 16, element_bytes=4),
        "train": accounting.training_ceiling(shape, result["rates"]["matrix_rate"], 12),
    }[workload]
    timed = rows(result, workload)
    assert list(timed) == ["fastgpt", "hf-eager", "hf-sdpa"]
    for row in timed.values():
        assert len(row["samples_s"]) == 5
        fastest, slowest = n_tokens / min(row["samples_s"]), n_tokens / max(row["samples_s"])
        middle = n_tokens / sorted(row["samples_s"])[2]
        assert row["tokens_per_s"]["max"] == pytest.approx(fastest)
        assert row["tokens_per_s"]["min"] == pytest.approx(slowest)
        assert row["tokens_per_s"]["median"] == pytest.approx(middle)
        assert row["percent_of_ceiling"] == pytest.approx(100 * middle / ceiling)
        assert row["first_run_s"] > 0


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    """And not that of the medians, 2, which lies outside the quartiles of the rounds."""
    comparison = benchmark.compare(ours_s=[1.0, 2.0, 10.0], theirs_s=[1.0, 4.0, 4.0])
    assert comparison["paired"] == {"median": 1.0, "quartile_1": 0.7, "quartile_3": 1.5, "min": 0.4, "max": 2.0}
    assert plotting.with_quartiles(comparison) == "1.00x (0.70 - 1.50)"


def test_every_baseline_of_every_workload_has_a_ratio(result: dict[str, Any]) -> None:
    pairs = [(ratio["workload"], ratio["baseline"]) for ratio in result["ratios"]]
    assert pairs == [(workload, name) for workload in workloads.WORKLOADS for name in ("hf-eager", "hf-sdpa")]
    for ratio in result["ratios"]:
        timed = rows(result, ratio["workload"])
        ours, theirs = (timed[name]["samples_s"] for name in ("fastgpt", ratio["baseline"]))
        rounds = sorted(slow / fast for fast, slow in zip(ours, theirs, strict=True))
        assert ratio["paired"]["median"] == pytest.approx(rounds[2])


def test_gate_reports_its_figures(result: dict[str, Any]) -> None:
    inference, training = result["gate"]["inference"], result["gate"]["training"]
    assert 0 <= inference["logit_error"] <= inference["allowed"] < 1e-4 * inference["largest_logit"]
    assert inference["transformers_logit_error"] > 0
    assert inference["greedy_tokens"] == inference["greedy_tokens_equal"] == 2 * 8
    assert 0 <= training["loss_difference"] <= 1e-5
    assert 0 <= training["gradient_difference"] <= 1e-4


def test_contenders_take_turns_at_going_first() -> None:
    names = ["a", "b", "c"]
    orders = [benchmark.rotated(names, turn) for turn in range(6)]
    assert all(sorted(order) == names for order in orders)
    for place in range(3):
        assert Counter(order[place] for order in orders) == {"a": 2, "b": 2, "c": 2}
    before = [order[order.index("b") - 1] for order in orders if order[0] != "b"]
    assert Counter(before) == {"a": 2, "c": 2}


def test_the_prompt_is_no_part_of_the_time_of_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in for a model, whose prompt takes 100 s and each later token 1 s."""
    clock = iter([0.0, *(100.0 + token for token in range(8))])
    monkeypatch.setattr(workloads.time, "perf_counter", lambda: next(clock))

    class Generates:
        def generate(self, ids: Tensor, max_new_tokens: int, streamer: Any, **options: Any) -> Tensor:
            streamer.put(ids)
            for _ in range(max_new_tokens):
                streamer.put(ids[:, -1])
            return torch.cat([ids, ids[:, -1:].expand(-1, max_new_tokens)], 1)

    work = workloads.decode("fastgpt", Generates(), torch.zeros(3, 5, dtype=torch.int64), 8)  # type: ignore[arg-type]
    assert work.seconds() == 7.0
    assert work.n_tokens == 3 * 7


def test_rates_count_what_a_second_moves_and_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy reads and writes 2**28 bytes, and a product of two 2048 x 2048 adds as many products as it has."""
    monkeypatch.setattr(machine, "_best_seconds", lambda call, device: 1.0)
    rates = machine.measure_rates(torch.device("cpu"), torch.bfloat16)
    assert rates == {"bandwidth": 2.0**29, "matrix_rate": 2.0 * 2048**3}


def test_peak_memory_is_what_a_call_needs_beyond_what_was_there() -> None:
    """To the byte: a gradient is freed and allocated again, and two temporaries live at a time."""
    held: list[Tensor] = []

    def call() -> None:
        held.clear()
        x = torch.ones(2**18)
        y = x + 1
        del x
        z = y * 2
        held.append(z)

    call()
    growth, measure = machine.peak_growth(call, torch.device("cpu"))
    assert measure == "torch allocations"
    assert 2**20 <= growth < 2**20 + 1000
    assert machine.peak_growth(lambda: None, torch.device("cpu"))[0] == 0


def test_counting_memory_says_nothing() -> None:
    code = "import torch; from fastgpt.bench import machine; machine.peak_growth(list, torch.device('cpu'))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of the resident set is read from /proc")
def test_resident_memory_of_engines_without_torch() -> None:
    def touch(n_mib: int) -> None:
        torch.ones(n_mib * 2**18).mul_(2)

    touch(1)
    small, measure = machine.resident_growth(lambda: touch(1))
    large, _ = machine.resident_growth(lambda: touch(300))
    assert measure == "resident set growth"
    assert small is not None
    assert large is not None
    assert small < 50 * 2**20
    assert 290 * 2**20 < large < 400 * 2**20


# --- contenders -----------------------------------------------------------------------------------------------------


def test_contenders_share_weights_by_value_only(directory: str) -> None:
    base, _ = workloads.load_base(directory)
    models = [workloads.contender(name, base, torch.device("cpu"), torch.float32) for name in ("fastgpt", "hf-eager")]
    ours, theirs = models
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert type(ours).__module__.startswith("fastgpt")
    assert type(theirs) is type(base) is GPT2LMHeadModel
    implementations = [model.config._attn_implementation for model in (base, ours, theirs)]
    assert implementations == ["sdpa", "fastgpt", "eager"]
    assert theirs.get_submodule("transformer.h.0.attn").config is theirs.config


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "distilgpt2", "gpt3-small"])
def test_preset_has_the_size_of_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.random.fork_rng", lambda devices: torch.device("meta"))
    base, weights = workloads.load_base(name)
    assert weights == "random"
    assert accounting.shape_of(base) == accounting.PRESETS[name]


@pytest.mark.parametrize("random_weights", [False, True])
def test_a_model_with_rounded_weights_is_refused(random_weights: bool, tmp_path: Path) -> None:
    fastgpt.quantize(pair(tiny_config())[1], bits=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has int4 weights: bench takes the model in floats"):
        workloads.load_base(str(tmp_path), random_weights=random_weights)


def test_random_weights_depend_on_the_seed_and_leave_the_generator_alone(directory: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, c = (workloads.load_base(directory, random_weights=True, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.get_parameter("transformer.h.0.mlp.c_fc.weight") for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_compile_that_fails_is_left_out_with_its_reason(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C++ compiler\nlong explanation")

    def work(workload: str, name: str, *args: Any) -> workloads.Work:
        made = make_work(workload, name, *args)
        return workloads.Work(no_compiler, made.seconds, 1, made.held_bytes) if name == "hf-compile" else made

    make_work = workloads.make_work
    monkeypatch.setattr(workloads, "make_work", work)
    options = BenchmarkOptions(model=directory, workloads="prefill", baselines="hf-compile,hf-sdpa", **SMALL)
    result = run_benchmark(options)
    reason = "RuntimeError: no C++ compiler"
    assert result["skipped"] == [{"workload": "prefill", "baseline": "hf-compile", "reason": reason}]
    assert list(rows(result, "prefill")) == ["fastgpt", "hf-sdpa"]
    assert reason in rendered(result)


# --- options --------------------------------------------------------------------------------------------------------


def test_options_take_lists_or_commas() -> None:
    options = BenchmarkOptions(workloads="decode, prefill,decode", baselines=["hf-sdpa"], device="cpu")
    assert options.workloads == ("decode", "prefill")
    assert options.baselines == ("hf-sdpa",)
    assert options.dtype == "float32"
    assert BenchmarkOptions(baselines="").baselines == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": "prefil"}, "unknown workload 'prefil': choose from prefill, decode, train"),
        ({"workloads": ""}, "no workload given"),
        ({"baselines": "hf-eager,vllm"}, "unknown baseline 'vllm'"),
        ({"batch": 0}, "batch must be 1 or more, not 0"),
        ({"prompt_tokens": 1}, "prompt_tokens must be 2 or more, not 1"),
        ({"new_tokens": 1}, "new_tokens must be 2 or more, not 1"),
        ({"runs": 4}, "runs must be 5 or more, not 4"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": "float16", "workloads": "train"}, "float16 needs loss scaling"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "meta"}, "not on meta"),
    ],
)
def test_options_that_cannot_be_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkOptions(**changes)


def test_tokens_past_the_context_are_refused_before_any_work(directory: str) -> None:
    options = BenchmarkOptions(model=directory, workloads="decode", device="cpu", prompt_tokens=40, new_tokens=9)
    with pytest.raises(ValueError, match=r"49 tokens do not fit in the context of .*, which is 48"):
        run_benchmark(options)


def test_model_that_is_not_gpt2_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 1}')
    with pytest.raises(ValueError, match="is not a GPT-2"):
        run_benchmark(BenchmarkOptions(model=str(tmp_path), random_weights=True, device="cpu"))


# --- output ---------------------------------------------------------------------------------------------------------


def rendered(result: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    benchmark.render(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_shows_path_ratio_parity_and_method(result: dict[str, Any]) -> None:
    text = rendered(result)
    assert text.count("fastgpt (torch path)") == 3
    ratio = result["ratios"][0]["paired"]["median"]
    assert f"{ratio:.2f}x (" in text
    median = rows(result, "prefill")["fastgpt"]["tokens_per_s"]["median"]
    assert f"{median:,.1f}" in text
    assert "16 of 16 greedy tokens equal" in text
    assert "resid 0.1" in text


def test_progress_starts_at_nothing_and_ends_at_everything(directory: str) -> None:
    heard: list[tuple[str, int, int]] = []
    options = BenchmarkOptions(model=directory, workloads="prefill", baselines="", **SMALL)
    run_benchmark(options, lambda *step: heard.append(step))
    assert heard[0] == (f"loading {directory}", 0, 3 + 2 + 5)
    assert heard[-1] == ("prefill: peak memory", 10, 10)
    done = [n_done for _, n_done, _ in heard]
    assert done == sorted(done)


def test_plot_is_a_png_with_something_on_it(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "speed.png"
    benchmark.plot([json.loads(json.dumps(result))] * 2, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    assert (pixels.min(-1) < 0.7).mean() > 0.02


def test_plot_without_matplotlib_says_what_to_install(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        benchmark.plot([result], tmp_path / "speed.png")


# --- profile --------------------------------------------------------------------------------------------------------


def test_profile_traces_every_workload(directory: str, tmp_path: Path) -> None:
    options = BenchmarkOptions(model=directory, workloads=workloads.WORKLOADS, dtype="float32", **SMALL)
    expenses = profiling.profile(options, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert {f"fastgpt {workload}": 1 for workload in workloads.WORKLOADS}.items() <= names.items()
    assert [e.seconds for e in expenses] == sorted((e.seconds for e in expenses), reverse=True)
    assert sum(e.share for e in expenses) == pytest.approx(1)
    assert "aten::addmm" in {e.operation for e in expenses}

    console = Console(file=io.StringIO(), width=120)
    profiling.render(expenses, console, n=3)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [e.operation in text for e in expenses[:3]] == [True] * 3
    assert text.count(" ms ") == 3


@pytest.mark.parametrize("name", ["hf-sdpa", workloads.OURS])
def test_a_training_step_clips_its_gradients_and_steps_once_for_all(name: str) -> None:
    model = workloads.contender(name, GPT2LMHeadModel(tiny_config(n_layer=1)), torch.device("cpu"), torch.float32)
    ids = torch.arange(18).view(2, 9)
    work = workloads.train(name, model, ids, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        work.run()
    assert {event.key: event.count for event in trace.key_averages()}["aten::_fused_adamw_"] == 1
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1.0, rel=1e-3)
