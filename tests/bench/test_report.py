"""The documentation's tables and plots say what the results say; predictions follow from the accounting's formulas."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from benchmarks.report import command as report
from benchmarks.report import paper, plots, records, tables
from fastgpt import accounting
from fastgpt.accounting import PRESETS

FLOAT32 = Path("benchmarks/results/cpu/2026-11-24-gpt2-float32-peers.json")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the report reads and writes, to change at will."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    for file in ("README.md", "docs/results.md", "docs/scale.md", "benchmarks/README.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / report.RESULTS, tmp_path / report.RESULTS)
    return tmp_path


def edit(file: Path, change: Any) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# --- agreement ------------------------------------------------------------------------------------------------------


def test_documentation_and_results_agree() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "report", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr


def test_check_fails_on_a_changed_figure_in_a_document(checkout: Path) -> None:
    page = checkout / "docs/results.md"
    page.write_text(page.read_text().replace("| 45.4 |", "| 99.9 |"))
    assert report.differences(checkout) == ["docs/results.md: the section measured is not what the results say"]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "report", "--check", "--root", str(checkout)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 1
    assert "docs/results.md: the section measured" in finished.stderr


def test_check_fails_on_changed_results_until_they_are_written(checkout: Path) -> None:
    medians = []

    def faster(content: dict[str, Any]) -> None:
        speed = content["results"][0]["tokens_per_s"]
        speed["median"] = speed["quartile_3"]
        medians.append(speed["median"])

    edit(checkout / FLOAT32, faster)
    stale = report.differences(checkout)
    assert any(line.startswith("docs/results.md") for line in stale)
    assert any("cpu-speed.svg" in line for line in stale)
    changed = report.write(checkout)
    assert Path("docs/results.md") in changed
    assert f"| prefill of 1 x 512, float32, 5 runs | {medians[0]:,.0f} |" in (checkout / "docs/results.md").read_text()
    assert report.differences(checkout) == []
    assert report.write(checkout) == []


def test_bug_a_plot_of_other_ratios_passed_the_check(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was known by the file of the results, and not by what its bars make of them."""
    edit(checkout / FLOAT32, lambda content: content["gate"]["inference"].update(largest_logit=1.0))
    assert report.differences(checkout) == []
    monkeypatch.setattr(plots.plotting, "ratio_text", lambda *_: "2.00x (1.00 - 3.00)")
    assert any("cpu-speed.svg" in line for line in report.differences(checkout))


def test_prose_around_the_markers_is_kept(checkout: Path) -> None:
    page = checkout / "docs/results.md"
    before = page.read_text()
    edit(checkout / FLOAT32, lambda content: content["options"].update(runs=9))
    report.write(checkout)
    after = page.read_text()
    assert after != before
    start, end = before.index("<!-- measured"), len(before) - before.index("<!-- /measured")
    assert after[:start] == before[:start]
    assert after[-end:] == before[-end:]


def test_a_plot_without_results_is_noticed_and_removed(checkout: Path) -> None:
    stray = checkout / report.PLOTS / "tpu-speed.svg"
    stray.write_text("<svg/>")
    assert report.differences(checkout) == ["benchmarks/results/plots/tpu-speed.svg: no result belongs to it"]
    report.write(checkout)
    assert not stray.exists()


def test_a_dry_run_is_no_result(checkout: Path) -> None:
    (checkout / report.RESULTS / "gpu").mkdir()
    file = checkout / report.RESULTS / "gpu" / "dry.json"
    file.write_text(json.dumps({"dry_run": True, "kernels tiny": {}}))
    with pytest.raises(ValueError, match="dry run"):
        records.load(checkout / report.RESULTS)
    file.write_text(json.dumps({"something": "else"}))
    with pytest.raises(ValueError, match="neither"):
        records.load(checkout / report.RESULTS)


def test_a_document_without_its_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for the section measured"):
        report.with_section("# A page", "measured", "table")


def test_an_engine_in_floats_that_states_its_error_stays_beside_the_others(checkout: Path) -> None:
    """llama.cpp rounds its GELU and not its weights."""
    content = json.loads((checkout / FLOAT32).read_text())
    accuracy = {"contender": "llama.cpp", "logit_error": 0.0005, "kl_divergence": 1e-7}
    content["results"] += [row | accuracy for row in content["results"] if row["contender"] == "fastgpt"]
    assert "llama.cpp" in {row["contender"] for row in records.benchmarks(content)[""]["results"]}


def published(name: str) -> records.Result:
    """A result of the project's own, measured on any day."""
    (file,) = (ROOT / "benchmarks" / "results" / "cpu").glob(f"*-{name}")
    return records.Result(file, json.loads(file.read_text()))


def test_bug_the_last_name_and_not_the_newest_result_stood_in_the_readme() -> None:
    newer = published("gpt2-512-peers.json").content
    older = newer | {"timestamp": "2026-11-29T00:00:00+00:00", "options": newer["options"] | {"prompt_tokens": 7}}
    both = [records.Result(Path("cpu/a.json"), newer), records.Result(Path("cpu/z.json"), older)]
    assert "1 x 512" in tables.headline(both)
    assert "1 x 7" not in tables.headline(both)


def test_bug_the_engines_beside_it_kept_a_dtype_out_of_the_readme() -> None:
    text = tables.headline([published("gpt2-512-peers.json"), published("gpt2-bfloat16-peers.json")])
    assert text.count("float32") == 2
    assert text.count("bfloat16") == 2


def test_quantized_weights_have_a_table_of_their_own(checkout: Path) -> None:
    """The tables and plots of exact weights leave out contenders whose weights are rounded."""
    content = json.loads((checkout / FLOAT32).read_text())
    without = records.benchmarks(content)[""]
    paired = {"median": 2.0, "quartile_1": 1.5, "quartile_3": 2.5}
    for name in ("fastgpt-int8", "engine-int8"):
        accuracy = {"contender": name, "logit_error": 0.0123, "kl_divergence": 1e-4}
        content["results"] += [row | accuracy for row in content["results"] if row["contender"] == "fastgpt"]
        content["ratios"] += [{"workload": "decode", "baseline": name, "paired": paired}]
    ratio = {"contender": "fastgpt-int8", "baseline": "engine-int8", "paired": paired}
    content["quantized_ratios"] = [{"workload": workload} | ratio for workload in ("prefill", "decode")]
    assert records.benchmarks(content)[""] == {**without, "quantized_ratios": content["quantized_ratios"]}
    (name, rows), *others = records.quantized(content).items()
    assert (name, others) == ("gpt2, 1 x 512 tokens", [])
    table = tables._quantized_table(rows).splitlines()[2:]
    assert len(table) == 6, "prefill and decode of fastgpt in floats, and of two in int8"
    assert [line for line in table if "2.00x (1.50 - 2.50)" in line and "engine-int8" in line and "0.012" in line]
    assert not records.quantized(without)


# --- operations -----------------------------------------------------------------------------------------------------


def operation(contender: str, median_s: float, direction: str = "forward+backward") -> dict[str, Any]:
    row = {"operation": "layer_norm", "direction": direction, "contender": contender}
    return row | {"median_s": median_s, "share_of_floor": 0.5, "bytes": 1, "flops": 1}


def point(contender: str, batch: int, peak: int | None) -> dict[str, Any]:
    row = {"workload": "train", "contender": contender, "batch": batch, "tokens": 1024}
    return row | ({"skipped": "no memory"} if peak is None else {"peak_memory_bytes": peak})


def latency(contender: str, context: int, median_s: float) -> dict[str, Any]:
    return {"contender": contender, "context": context, "seconds_per_token": {"median": median_s}}


@pytest.fixture
def of_gpu(checkout: Path) -> dict[str, Any]:
    """What `benchmarks gpu` writes, of every step and of one that the report does not know."""
    machine = {"gpu": "Some GPU", "cpu": "Some CPU", "threads": 2, "cpu_capability": "AVX512"}
    versions = {"torch": "2.11", "triton": "3.6", "transformers": "5.17"}
    layer_norm = [
        operation("fastgpt", 0.001),
        operation("torch", 0.003),
        operation("quick", 0.002),
        {"operation": "layer_norm", "direction": "forward", "contender": "fastgpt", "skipped": "no memory"},
        {"operation": "layer_norm", "contender": "liger", "skipped": "ModuleNotFoundError"},
    ]
    benchmark = json.loads((checkout / FLOAT32).read_text())
    benchmark["machine"] |= machine
    benchmark["options"] |= {"workloads": ["prefill"], "batch": 16}
    benchmark["results"] = [row for row in benchmark["results"] if row["workload"] == "prefill"]
    product = {"rows": 16384, "in": 768, "out": 2304, "flops_per_s": 6.5e14, "bytes_per_s": 1.5e12}
    start = {"total_s": 8.25, "model_s": 2.5, "token_s": 1.25}
    return {
        "schema": 2,
        "dry_run": False,
        "seconds": {"environment": 0.1},
        "environment": {"machine": machine, "versions": versions, "commit": None},
        "rates": {"bandwidth": 1e12, "matrix_rate": 1e15},
        "prefill gpt2": {"batch 16": benchmark, "batch 1": {"fault": "ParityError: no"}},
        "kernels gpt2": {"layer_norm": layer_norm, "gelu_mlp": {"fault": "ParityError: result 0 errs by 1"}},
        "ceilings": {"memory": {"copy": 1e12}, "products gpt2": [{"product": "qkv"} | product]},
        "memory gpt2": {
            "train, batch 1": [point("fastgpt", 1, 2_000_000_000), point("hf-sdpa", 1, 4_000_000_000)],
            "train, batch 64": [point("fastgpt", 64, 9_000_000_000), point("hf-sdpa", 64, None)],
        },
        "latency gpt2": {"context 64": [latency("fastgpt", 64, 0.001), latency("hf-sdpa", 64, 0.004)]},
        "cold start gpt2": {"gpt2": {"fresh": [start], "warm": [start, start]}},
        "weather": {"today": [1, 2], "tomorrow": 3, "later": {"rain": True}},
    }


def write_gpu(checkout: Path, content: dict[str, Any]) -> None:
    (checkout / report.RESULTS / "gpu").mkdir()
    (checkout / report.RESULTS / "gpu" / "day.json").write_text(json.dumps(content))


def test_every_step_of_a_gpu_has_its_table(checkout: Path, of_gpu: dict[str, Any]) -> None:
    write_gpu(checkout, of_gpu)
    report.write(checkout)
    readme = (checkout / "docs/results.md").read_text()
    assert "| prefill of 16 x 512, float32, 5 runs | 1,130 |" in readme
    text = (checkout / "benchmarks/README.md").read_text()
    assert "**Operations of gpt2**: Some GPU; torch 2.11, triton 3.6, transformers 5.17." in text
    assert "| layer_norm | forward+backward | 1.000 | 50% | 3.00x | 2.00x (quick) |" in text
    assert "| layer_norm | forward | no memory | - | - | - |" in text
    assert "| gelu_mlp | all | ParityError: result 0 errs by 1 | - | - | - |" in text
    assert "Not run: liger." in text
    assert "| qkv, 768 to 2,304 | 650.0 TFLOP/s, 1,500 GB/s |" in text
    assert "| train of 1 x 1024 | 2.00 | 4.00 | 0.50x |" in text
    assert "| train of 64 x 1024 | 9.00 | - | - |" in text
    assert "| 64 | 1.00 | 4.00 | 4.00x |" in text
    assert "| everything compiled before | 2 | 8.2 | 2.5 | 1.2 |" in text
    assert report.differences(checkout) == []


def test_every_step_of_a_gpu_has_its_plot(checkout: Path, of_gpu: dict[str, Any]) -> None:
    write_gpu(checkout, of_gpu)
    report.write(checkout)
    drawn = {file.stem for file in (checkout / report.PLOTS).glob("gpu-*.svg")}
    assert drawn == {"gpu-speed", "gpu-ceiling", "gpu-day-kernels", "gpu-day-memory", "gpu-day-latency"}


@pytest.mark.parametrize("n_steps", [4, 6, 8, 10])
def test_a_run_that_was_cut_off_has_its_part_of_the_report(
    checkout: Path, of_gpu: dict[str, Any], n_steps: int
) -> None:
    write_gpu(checkout, dict(list(of_gpu.items())[:n_steps]))
    report.write(checkout)
    assert report.differences(checkout) == []


def test_what_a_file_holds(of_gpu: dict[str, Any]) -> None:
    assert list(records.benchmarks(of_gpu)) == ["prefill gpt2, batch 16"]
    assert records.faults(of_gpu) == [
        "prefill gpt2, batch 1: ParityError: no",
        "kernels gpt2, gelu_mlp: ParityError: result 0 errs by 1",
    ]
    assert list(records.curve(of_gpu, "memory")) == list(records.curve(of_gpu, "latency")) == ["gpt2"]


def test_curves_leave_out_what_was_not_measured() -> None:
    rows = [point("fastgpt", 1, 2_000_000_000), point("fastgpt", 2, 3_000_000_000), point("hf-sdpa", 2, None)]
    plot = plots.memory("gpu", {"gpt2": rows})
    assert plot.figures == {"gpt2, train of 1024 tokens each": {"fastgpt": [(1, 2.0), (2, 3.0)]}}
    assert plots.latency("gpu", {}).figures == {}


def test_a_stack_holds_the_same_operations_for_both() -> None:
    rows = [operation("fastgpt", 0.001), operation("torch", 0.003), operation("fastgpt", 0.002) | {"operation": "mlp"}]
    plot = plots.kernel_times("gpu", {"gpt2": rows})
    assert plot.figures == {"gpt2": {"fastgpt": {"layer_norm": 1.0}, "torch": {"layer_norm": 3.0}}}
    assert plots.kernel_times("gpu", {"gpt2": rows[:1]}).figures == {}


# --- on paper -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", paper.SIZES)
def test_predicted_work_is_that_of_the_accounting(name: str) -> None:
    shape = PRESETS[name]
    prefill = paper.prefill_work(shape, 3, 1024)
    assert sum(work.flops for work in prefill) == 3 * accounting.forward_flops(shape, 1024)
    train = paper.training_work(shape, 3, 1024)
    assert sum(work.flops for work in train) == 3 * accounting.training_flops(shape, 1024)
    decode_bytes = sum(work.n_bytes for work in paper.decode_work(shape, 1, 512))
    assert decode_bytes == pytest.approx(accounting.decode_bytes(shape, 1, 512), rel=0.01)


def test_no_prediction_passes_a_ceiling() -> None:
    shape = PRESETS["gpt2"]
    n_tokens = paper.BATCH * paper.TOKENS
    prefill_s = paper.seconds(paper.prefill_work(shape, paper.BATCH, paper.TOKENS), paper.H200)
    assert n_tokens / prefill_s < accounting.prefill_ceiling(shape, paper.H200.matrix_rate, paper.TOKENS)
    decode_s = paper.seconds(paper.decode_work(shape, 1, 512), paper.H200)
    assert 1 / decode_s < accounting.decode_ceiling(shape, paper.H200.bandwidth, 1, 512)


def test_paper_is_printed() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "report", "--paper"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0
    assert "| gpt2-xl, FSDP2 |" in finished.stdout
