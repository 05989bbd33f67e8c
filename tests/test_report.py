"""The documentation's tables and plots say what the results say; predictions follow from the accounting's formulas."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper, plots, report
from fastgpt import accounting
from fastgpt.accounting import PRESETS, count_parameters

ROOT = Path(__file__).parent.parent
FLOAT32 = Path("benchmarks/results/cpu/2026-11-23-gpt2-float32.json")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the report reads and writes, to change at will."""
    (tmp_path / "benchmarks").mkdir()
    for file in ("README.md", "benchmarks/README.md"):
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
        [sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr


def test_check_fails_on_a_changed_figure_in_the_readme(checkout: Path) -> None:
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("| 46.2 |", "| 99.9 |"))
    assert report.differences(checkout) == ["README.md: the section measured is not what the results say"]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--check", "--root", str(checkout)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 1
    assert "README.md: the section measured" in finished.stderr


def test_check_fails_on_changed_results_until_they_are_written(checkout: Path) -> None:
    medians = []

    def faster(content: dict[str, Any]) -> None:
        speed = content["results"][0]["tokens_per_s"]
        speed["median"] = speed["quartile_3"]
        medians.append(speed["median"])

    edit(checkout / FLOAT32, faster)
    stale = report.differences(checkout)
    assert any(line.startswith("README.md") for line in stale)
    assert any("cpu-speed.svg" in line for line in stale)
    changed = report.write(checkout)
    assert Path("README.md") in changed
    assert f"| prefill, float32, 7 runs | {medians[0]:,.0f} |" in (checkout / "README.md").read_text()
    assert report.differences(checkout) == []
    assert report.write(checkout) == []


def test_prose_around_the_markers_is_kept(checkout: Path) -> None:
    readme = checkout / "README.md"
    before = readme.read_text()
    edit(checkout / FLOAT32, lambda content: content["options"].update(runs=9))
    report.write(checkout)
    after = readme.read_text()
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
    file.write_text(json.dumps({"dry_run": True, "kernels tiny": []}))
    with pytest.raises(ValueError, match="dry run"):
        report.load(checkout / report.RESULTS)
    file.write_text(json.dumps({"something": "else"}))
    with pytest.raises(ValueError, match="neither"):
        report.load(checkout / report.RESULTS)


def test_a_document_without_its_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for the section measured"):
        report.with_section("# A page", "measured", "table")


# --- operations -----------------------------------------------------------------------------------------------------


def operation(contender: str, median_s: float, direction: str = "forward+backward") -> dict[str, Any]:
    row = {"operation": "layer_norm", "direction": direction, "contender": contender}
    return row | {"median_s": median_s, "share_of_floor": 0.5, "bytes": 1, "flops": 1}


def test_operations_of_a_gpu(checkout: Path) -> None:
    machine = {"gpu": "Some GPU", "cpu": "Some CPU", "threads": 2, "cpu_capability": "AVX512"}
    versions = {"torch": "2.11", "triton": "3.6", "transformers": "5.17"}
    rows = [
        operation("fastgpt", 0.001),
        operation("torch", 0.003),
        operation("quick", 0.002),
        {"operation": "layer_norm", "direction": "forward", "contender": "fastgpt", "skipped": "no memory"},
        {"operation": "gelu_mlp", "fault": "gelu_mlp: result 0 errs by 1"},
    ]
    result = {"dry_run": False, "environment": {"machine": machine, "versions": versions}, "kernels gpt2": rows}
    (checkout / report.RESULTS / "gpu").mkdir()
    (checkout / report.RESULTS / "gpu" / "day.json").write_text(json.dumps(result))
    report.write(checkout)
    text = (checkout / "README.md").read_text()
    assert "**Operations of gpt2**: Some GPU; torch 2.11, triton 3.6, transformers 5.17." in text
    assert "| layer_norm | forward+backward | 1.000 | 50% | 3.00x | 2.00x (quick) |" in text
    assert "| layer_norm | forward | no memory | - | - | - |" in text
    assert "| gelu_mlp | all | gelu_mlp: result 0 errs by 1 | - | - | - |" in text
    assert (checkout / report.PLOTS / "gpu-day-kernels.svg").is_file()
    assert report.differences(checkout) == []


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


def test_eight_gpus() -> None:
    shape = PRESETS["gpt2"]
    n = count_parameters(shape).total
    ddp, fsdp2 = paper.ddp(shape, paper.H200), paper.fsdp2(shape, paper.H200)
    assert ddp.wire_bytes == fsdp2.wire_bytes == 7 * n
    assert fsdp2.state_bytes == ddp.state_bytes / 8 == 2 * n
    for scaled in (ddp, fsdp2):
        assert scaled.hidden_s < scaled.exposed_s
    # On links too slow to hide behind anything, both bounds are the wire's.
    slow = paper.Machine(paper.H200.bandwidth, paper.H200.matrix_rate, link_rate=1e6, launch_s=0)
    assert paper.fsdp2(shape, slow).hidden_s == pytest.approx(7 * n / 1e6, rel=1e-3)


def test_paper_is_printed() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--paper"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0
    assert "| gpt2-xl, FSDP2 |" in finished.stdout
