"""Is fastgpt still as much faster than transformers on a CPU as the committed results say?

    python -m benchmarks guard                # every result in benchmarks/results/cpu
    python -m benchmarks guard FILE ...

Each is measured again with its own options, in minutes and on an idle machine: this is a benchmark and no test. Only
ratios of one run are compared, so that a slower machine is no regression.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.table import Table

from fastgpt import bench as benchmark
from fastgpt.bench import BenchmarkOptions
from fastgpt.bench.workloads import BASELINES

from ..report.command import ROOT
from ..report.records import benchmarks
from ..report.tables import RESULTS, describe_work

# The share of a ratio by which it may always fall: two runs of the same code differ as much, even where the rounds of
# each agree.
MIN_DROP = 0.03


@dataclass(frozen=True)
class Verdict:
    """A ratio in the committed result (then) and measured again (now, None if the baseline could not be measured).

    allowed: how far it may fall.
    """

    work: str
    baseline: str
    then: float
    now: float | None
    allowed: float

    @property
    def has_fallen(self) -> bool:
        return self.now is None or self.then - self.now > self.allowed


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Verdict]:
    """A verdict for each ratio to transformers in the result `then`.

    It may fall by as much as the quartiles of its rounds are apart in both results together, and by 3% in any case.
    """
    ratios = {(row["workload"], row["baseline"]): row for row in now["ratios"]}
    for row in then["ratios"]:
        if row["baseline"] not in BASELINES:
            continue
        again = ratios.get((row["workload"], row["baseline"]))
        spread = _spread(row) + (_spread(again) if again else 0.0)
        yield Verdict(
            work=describe_work(then, row["workload"]),
            baseline=row["baseline"],
            then=row["paired"]["median"],
            now=again["paired"]["median"] if again else None,
            allowed=max(spread, MIN_DROP * row["paired"]["median"]),
        )


def _spread(ratio: Mapping[str, Any]) -> float:
    return ratio["paired"]["quartile_3"] - ratio["paired"]["quartile_1"]


def measure_again(then: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Run the benchmark of a result again, with its options. Raises ParityError when fastgpt is wrong."""
    with benchmark.progress_bar(console) as progress:
        return benchmark.run_benchmark(BenchmarkOptions(**then["options"]), progress)


def render(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the verdicts as a table."""
    table = Table("work", "compared with")
    for heading in ("then", "now", "may fall by", ""):
        table.add_column(heading, justify="right")
    for verdict in verdicts:
        now = "not measured" if verdict.now is None else f"{verdict.now:.2f}x"
        judgement = "[red]has fallen[/]" if verdict.has_fallen else "holds"
        table.add_row(verdict.work, verdict.baseline, f"{verdict.then:.2f}x", now, f"{verdict.allowed:.2f}", judgement)
    console.print(table)


def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="results of fastgpt bench; all of the CPU's if none")
    ] = None,
) -> None:
    """Measure the committed ratios again; exit 1 when one has fallen."""
    transformers.logging.set_verbosity_error()
    verdicts: list[Verdict] = []
    for file in files or sorted((ROOT / RESULTS / "cpu").glob("*.json")):
        for then in benchmarks(json.loads(file.read_text())).values():
            verdicts += compare(then, measure_again(then, Console(stderr=True)))
    if not verdicts:
        raise typer.BadParameter("there is no ratio to transformers in these results")
    render(verdicts, Console(width=120))
    if any(verdict.has_fallen for verdict in verdicts):
        raise typer.Exit(1)
