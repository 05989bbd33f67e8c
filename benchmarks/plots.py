"""Plots of the results as SVG files, each of which says from which figures it was drawn.

They stand on a white ground of their own, so that a light and a dark page show the same picture.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt import plotting
from fastgpt.workloads import OURS, WORKLOADS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Operations in the order of a step, told apart by anyone, in print too (Okabe and Ito's palette).
_PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")


@dataclass(frozen=True)
class Plot:
    """A file's name without its ending, the text for those who do not see it, its figures, and how they are drawn."""

    name: str
    caption: str
    figures: Any
    size_inches: tuple[float, float]
    draw: Callable[["Figure"], None]

    @property
    def fingerprint(self) -> str:
        """Of the figures: the drawing itself differs between versions of matplotlib."""
        return hashlib.sha256(json.dumps([self.name, self.figures], sort_keys=True).encode()).hexdigest()

    def is_drawn(self, file: Path) -> bool:
        """Whether a file shows these figures."""
        return file.is_file() and self.fingerprint in file.read_text()

    def save(self, file: Path) -> None:
        """Draw into a file, whose bytes depend on the figures and on matplotlib alone."""
        import matplotlib
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size_inches, layout="constrained", facecolor="white")
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.draw(figure)
            figure.savefig(file, format="svg", metadata={"Date": None, "Description": self.fingerprint})


# --- whole models ---------------------------------------------------------------------------------------------------


def speeds(device: str, results: Sequence[dict[str, Any]]) -> Plot:
    """tokens/s of every contender: a row of panels for each result, one panel for each workload."""
    n_columns = max(len(plotting.by_workload(result)) for result in results)
    heights = [1.4 + 0.5 * max(map(len, plotting.by_workload(result).values())) for result in results]

    def draw(figure: "Figure") -> None:
        rows = figure.subfigures(len(results), 1, height_ratios=heights, squeeze=False)[:, 0]
        for row, result in zip(rows, results, strict=True):
            panels = row.subplots(1, n_columns, squeeze=False)[0]
            groups = list(plotting.by_workload(result).items())
            for panel, (workload, bars) in zip(panels, groups, strict=False):
                plotting.draw(panel, result, workload, bars)
            for panel in panels[len(groups) :]:
                panel.axis("off")
            machine = result["machine"]
            place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
            heading = f"{plotting.title(result)}, median of {result['options']['runs']} runs\n{place}"
            row.suptitle(heading, fontsize=9, x=0.01, ha="left")

    caption = f"tokens/s of each contender on {device}, with quartiles"
    return Plot(f"{device}-speed", caption, list(results), (4.6 * n_columns, sum(heights)), draw)


def ceilings(device: str, results: Sequence[dict[str, Any]]) -> Plot:
    """Percent of the ceiling that fastgpt reaches, one panel for each workload, the smallest model on top."""
    bars: dict[str, list[tuple[str, float]]] = {}
    for result in sorted(results, key=lambda result: result["model"]["n_layer"] * result["model"]["n_embd"] ** 2):
        options = result["options"]
        name = f"{Path(result['model']['name']).name}, {options['dtype']}\n{options['runs']} runs"
        for row in result["results"]:
            if row["contender"] == OURS:
                bars.setdefault(row["workload"], []).append((name, row["percent_of_ceiling"]))
    workloads = [workload for workload in WORKLOADS if workload in bars]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(workloads), squeeze=False)[0]
        for panel, workload in zip(panels, workloads, strict=True):
            names, percents = zip(*bars[workload], strict=True)
            panel.barh(range(len(names)), percents, color=plotting.COLOURS[OURS], height=0.62)
            for position, percent in enumerate(percents):
                panel.text(percent, position, f" {percent:.0f}%", va="center", fontsize=8, color=plotting.INK)
            panel.set_xlim(0, max(100, *(1.15 * percent for percent in percents)))
            panel.set_yticks(range(len(names)), names, fontsize=8)
            panel.invert_yaxis()
            panel.set_title(workload, fontsize=10)
            panel.set_xlabel("percent of the ceiling measured in the same run")
            panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"fastgpt on {device}", fontsize=10)

    height = 1.5 + 0.5 * max(map(len, bars.values()))
    caption = f"percent of the measured ceiling that fastgpt reaches on {device}, by size"
    return Plot(f"{device}-ceiling", caption, bars, (4.6 * len(workloads), height), draw)


# --- operations -----------------------------------------------------------------------------------------------------


def kernel_times(device: str, sizes: dict[str, list[dict[str, Any]]]) -> Plot:
    """Milliseconds of one call of every operation, forward and backward, stacked: fastgpt's above torch's.

    sizes: the rows of `benchmarks.operations.measure` by the model's name. Operations that either lacks are left out
    of both, or their sums could not be compared.
    """
    times: dict[str, dict[str, dict[str, float]]] = {}
    for size, rows in sizes.items():
        by_contender: dict[str, dict[str, float]] = {OURS: {}, "torch": {}}
        for row in rows:
            if row.get("direction") == "forward+backward" and "median_s" in row and row["contender"] in by_contender:
                by_contender[row["contender"]][row["operation"]] = 1000 * row["median_s"]
        both = [operation for operation in by_contender[OURS] if operation in by_contender["torch"]]
        if both:
            times[size] = {name: {op: ms[op] for op in both} for name, ms in by_contender.items()}
    operations = list(dict.fromkeys(op for size in times.values() for op in size[OURS]))
    colours = {op: _PALETTE[i % len(_PALETTE)] for i, op in enumerate(operations)}

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(len(times), 1, squeeze=False)[:, 0]
        for panel, (size, contenders) in zip(panels, times.items(), strict=True):
            for position, parts in enumerate(contenders.values()):
                left = 0.0
                for operation, ms in parts.items():
                    label = operation if position == 0 else None
                    panel.barh(position, ms, left=left, color=colours[operation], label=label, height=0.62)
                    left += ms
                panel.text(left, position, f" {left:.2f} ms", va="center", fontsize=8, color=plotting.INK)
            panel.set_xlim(0, 1.2 * max(sum(parts.values()) for parts in contenders.values()))
            panel.set_yticks(range(len(contenders)), list(contenders))
            panel.invert_yaxis()
            panel.set_title(f"{size}: one call of each operation, forward and backward", fontsize=10)
            panel.set_xlabel("ms")
            panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)

    caption = f"milliseconds of one call of each operation on {device}, fastgpt's above torch's"
    return Plot(f"{device}-kernels", caption, times, (8.0, 0.8 + 1.7 * max(1, len(times))), draw)
