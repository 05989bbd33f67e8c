"""The printed results of `benchmarks gpu`: what agrees, what failed, and tables of speed."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgpt.bench import plotting

from ..report import records


def render(result: Mapping[str, Any], console: Console) -> None:
    """Print all that there is."""
    smoke = [part for step, parts in result.items() if step.startswith("smoke ") for part in parts.values()]
    if smoke:
        n_agreeing = sum("fault" not in part for part in smoke)
        console.print(f"{n_agreeing} of {len(smoke)} smoke tests agree")
    for file, tests in result.get("tests", {}).items():
        console.print(f"{file}: {tests.get('summary', '')}", *tests.get("failures", [])[:20], sep="\n", markup=False)
    for fault in records.faults(result):
        console.print(fault, style="red", markup=False)
    for what, wait in result.get("waits", {}).items():
        if "fault" not in wait:
            console.print(f"{what}: {1e6 * wait['median_s']:.2f} us")
    if benchmarks := records.benchmarks(result):
        console.print(_model_table(benchmarks))
    for size, rows in records.operations(result).items():
        console.print(_operation_table(size, rows))
        for row in (row for row in rows if "skipped" in row):
            which = f"left out: {row['operation']} {row.get('direction', '')} of {row['contender']}:"
            console.print(which, row["skipped"], style="dim", markup=False)
    for size, starts in records.cold_starts(result).items():
        totals = [f"{kind} {min(start['total_s'] for start in starts[kind]):.1f} s" for kind in starts]
        console.print(f"cold start of {size}:", *totals)


def _model_table(benchmarks: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("whole models", "contender")
    for heading in ("tokens/s", "fastgpt is", "of ceiling", "peak, GB"):
        table.add_column(heading, justify="right")
    for name, content in benchmarks.items():
        for row in content["results"]:
            peak = row["peak_memory_bytes"]
            table.add_row(
                name,
                plotting.label(content, row["contender"]),
                f"{row['tokens_per_s']['median']:,.0f}",
                plotting.ratio_text(content, row["workload"], row["contender"]),
                f"{row['percent_of_ceiling']:.0f}%",
                "n/a" if peak is None else f"{peak / 1e9:.2f}",
            )
        for row in content["skipped"]:
            table.add_row(name, row["baseline"], row["reason"])
    return table


def _operation_table(size: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"kernels {size}", title_justify="left")
    for heading in ("operation", "pass", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "GB/s", "TFLOP/s", "of the floor", "fastgpt is"):
        table.add_column(heading, justify="right")
    ours: dict[tuple[str, str], float] = {}
    for row in (row for row in rows if "median_s" in row):
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
    return table
