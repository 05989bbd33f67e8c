"""Everything that only a GPU can prove, in one command: parity of the kernels, then their times beside torch's.

    PYTHONPATH=.:kernels python -m benchmarks.gpu --minutes 8 --out DIR

It needs a checkout and no installation. What matters most comes first, and DIR/result.json is written after every step:
a run that is cut off leaves what it had, and the same command goes on from there. `--dry-run` takes every step on tiny
shapes, on a CPU with the kernels in the interpreter: it proves the command, and its times say nothing.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastgpt import machine
from fastgpt.accounting import PRESETS, Shape
from fastgpt.doctor import versions
from fastgpt.ops import backend

from . import operations

ROOT = Path(__file__).parent.parent
SCHEMA = 1
TINY = {"tiny": Shape(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=67)}
_log = Console(stderr=True)


@dataclass
class Run:
    """What is known so far, and how much time is left."""

    device: torch.device
    shapes: dict[str, Shape]
    n_batch: int
    n_tokens: int
    dtype: torch.dtype
    row_s: float
    tests: tuple[str, ...]
    n_processes: int
    stop_at: float
    file: Path
    result: dict[str, Any]

    def save(self) -> None:
        """Replace the file whole, so that it is valid whenever the process ends."""
        unfinished = self.file.with_suffix(".part")
        unfinished.write_text(json.dumps(self.result, indent=1))
        unfinished.replace(self.file)

    @property
    def seconds_left(self) -> float:
        return self.stop_at - time.monotonic()


# --- steps ----------------------------------------------------------------------------------------------------------


def environment(run: Run) -> dict[str, Any]:
    """The machine, versions and the commit."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "machine": machine.describe(run.device),
        "versions": versions(),
        "commit": git.stdout.strip() or os.environ.get("FASTGPT_COMMIT"),
    }


def parity(run: Run) -> dict[str, Any]:
    """The tests of the kernels on this device; the last lines tell which failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--accuracy-table", *run.tests]
    if run.n_processes > 1:
        command += ["-n", str(run.n_processes)]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))
    try:
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=max(60.0, run.seconds_left),
        )
    except subprocess.TimeoutExpired as error:
        return {"passed": False, "seconds": error.timeout, "failures": ["the tests took longer than the time left"]}
    lines = finished.stdout.splitlines()
    run.file.with_name("parity.txt").write_text(finished.stdout + finished.stderr)
    return {
        "passed": finished.returncode == 0,
        "summary": next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed)", line)), None),
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "accuracy": [line for line in lines if line.startswith("│")],
    }


def rates(run: Run) -> dict[str, float]:
    """Bandwidth in bytes/s and matrix rate in FLOP/s, the ceilings of all that follows."""
    if run.shapes is TINY:
        return {"bandwidth": 1e9, "matrix_rate": 1e9}
    return machine.measure_rates(run.device, run.dtype)


def kernels(run: Run, name: str) -> list[dict[str, Any]]:
    """Every operation at one size, checked and then timed; no figure of one that is wrong."""
    rows: list[dict[str, Any]] = []
    for case in operations.cases(run.shapes[name], run.n_batch, run.n_tokens, run.device, run.dtype):
        try:
            fault = operations.check(case)
        except Exception as error:  # Whatever a kernel raises is a finding about it.
            fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        _log.print(f"  {case.operation}: {fault or 'agrees'}", style="red" if fault else "dim")
        if fault:
            rows.append({"operation": case.operation, "fault": fault})
        elif run.seconds_left > 0:
            rows += operations.measure(case, run.result["rates"], run.row_s)
        else:
            rows.append({"operation": case.operation, "skipped": "no time left"})
    return rows


def _steps(run: Run) -> Iterator[tuple[str, Callable[[Run], Any]]]:
    yield "environment", environment
    yield "parity", parity
    yield "rates", rates
    for name in run.shapes:
        yield f"kernels {name}", lambda run, name=name: kernels(run, name)


# --- the command ----------------------------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="folder for result.json and parity.txt; an unfinished run is continued")],
    minutes: Annotated[float, typer.Option(help="start no further step after this long")] = 8.0,
    sizes: Annotated[str, typer.Option(help="presets, in the order of their importance")] = "gpt2,gpt2-xl",
    batch: Annotated[int, typer.Option(help="sequences of 1024 tokens")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="every step on tiny shapes, on a CPU")] = False,
) -> None:
    """Prove the kernels on the GPU at hand."""
    unknown = [name for name in sizes.split(",") if name not in PRESETS]
    if unknown:
        raise typer.BadParameter(f"unknown size {unknown[0]!r}: give some of {', '.join(PRESETS)}")
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU is visible to torch; --dry-run goes through every step on a CPU")
    if dry_run and "TRITON_INTERPRET" not in os.environ:  # which triton reads when it is imported, as it is by now
        again = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | {"TRITON_INTERPRET": "1"})
    out.mkdir(parents=True, exist_ok=True)
    run = _make_run(out / "result.json", dry_run, sizes.split(","), batch, time.monotonic() + 60 * minutes)

    with backend("triton"):
        for name, step in _steps(run):
            if name in run.result:
                continue
            if run.seconds_left <= 0:
                _log.print(f"no time left for {name}", style="yellow")
                break
            _log.print(name)
            start = time.monotonic()
            run.result[name] = step(run)
            run.result["seconds"][name] = round(time.monotonic() - start, 1)
            run.save()
    render(run.result, Console(width=120))
    if not run.result.get("parity", {}).get("passed", False):
        raise typer.Exit(1)


def _make_run(file: Path, dry_run: bool, sizes: list[str], batch: int, stop_at: float) -> Run:
    result = json.loads(file.read_text()) if file.is_file() else {"schema": SCHEMA, "dry_run": dry_run, "seconds": {}}
    if result.get("schema") != SCHEMA or result.get("dry_run") != dry_run:
        raise typer.BadParameter(f"{file} is the result of another kind of run: give another folder")
    if dry_run:
        tests = ("tests/test_layer_norm_kernel.py", "-k", "wrong_shapes")
        return Run(torch.device("cpu"), TINY, 2, 17, torch.float32, 0.0, tests, 1, stop_at, file, result)
    tests = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*_kernel.py")))
    shapes = {name: PRESETS[name] for name in sizes}
    n_processes = min(16, os.cpu_count() or 1)
    return Run(
        torch.device("cuda"), shapes, batch, 1024, torch.bfloat16, 0.1, tests, n_processes, stop_at, file, result
    )


def render(result: dict[str, Any], console: Console) -> None:
    """The tests' summary and a table of times."""
    tests = result.get("parity", {})
    console.print(f"parity: {tests.get('summary')}", *tests.get("failures", [])[:20], sep="\n", markup=False)
    for name in [key for key in result if key.startswith("kernels ")]:
        table = Table("operation", "pass", "contender", title=name, title_justify="left")
        for heading in ("ms", "GB/s", "TFLOP/s", "of the floor", "fastgpt is"):
            table.add_column(heading, justify="right")
        ours: dict[tuple[str, str], float] = {}
        for row in result[name]:
            if "median_s" not in row:
                why = row.get("fault") or row.get("skipped", "")
                table.add_row(row["operation"], row.get("direction", ""), row.get("contender", ""), why)
                continue
            key, median_s = (row["operation"], row["direction"]), row["median_s"]
            ours.setdefault(key, median_s)
            table.add_row(
                *key,
                row["contender"],
                f"{median_s * 1e3:.3f}",
                f"{row['bytes'] / median_s / 1e9:.0f}",
                f"{row['flops'] / median_s / 1e12:.0f}",
                f"{row['share_of_floor']:.0%}",
                f"{median_s / ours[key]:.2f}x",
            )
        console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
