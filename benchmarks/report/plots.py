"""Plots of the results as SVG files. Each file names the figures from which it was drawn.

The background is white, so that light and dark pages show the same picture.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.bench import plotting
from fastgpt.bench.workloads import OURS, WORKLOADS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Operations in the order of a step, told apart by anyone, in print too (Okabe and Ito's palette).
_PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")


@dataclass(frozen=True)
class Plot:
    """name: of the file, without its suffix. caption: the text in place of the picture. figures: what is drawn."""

    name: str
    caption: str
    figures: Any
    size_inches: tuple[float, float]
    draw: Callable[["Figure"], None]

    @property
    def fingerprint(self) -> str:
        """A hash of the figures, because the drawing itself differs between versions of matplotlib."""
        return hashlib.sha256(json.dumps([self.name, self.figures], sort_keys=True).encode()).hexdigest()

    def is_drawn(self, file: Path) -> bool:
        """Whether a file shows these figures."""
        return file.is_file() and self.fingerprint in file.read_text()

    def save(self, file: Path) -> None:
        """Draw into a file. Its bytes depend only on the figures and the version of matplotlib."""
        import matplotlib
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size_inches, layout="constrained", facecolor="white")
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.draw(figure)
            figure.savefig(file, format="svg", metadata={"Date": None, "Description": self.fingerprint})


# --- whole models ---------------------------------------------------------------------------------------------------


def speeds(device: str, results: Sequence[Mapping[str, Any]]) -> Plot:
    """tokens/s of every contender: a group of panels for each model and dtype, a panel for each work."""
    groups: dict[str, list[tuple[Mapping[str, Any], str, list[Any]]]] = {}
    for result in results:
        machine = result["machine"]
        place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
        for workload, bars in plotting.by_workload(result).items():
            groups.setdefault(f"{plotting.title(result)}; {place}", []).append((result, workload, bars))
    n_columns = min(2, max(map(len, groups.values())))
    n_rows = {heading: -(-len(works) // n_columns) for heading, works in groups.items()}
    heights = [
        0.5 + n_rows[heading] * (0.9 + 0.45 * max(len(bars) for _, _, bars in works))
        for heading, works in groups.items()
    ]

    def draw(figure: "Figure") -> None:
        parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (heading, works) in zip(parts, groups.items(), strict=True):
            panels = part.subplots(n_rows[heading], n_columns, squeeze=False).flat
            for panel, (result, workload, bars) in zip(panels, sorted(works, key=_order), strict=False):
                plotting.draw(panel, result, workload, bars)
                panel.set_title(_work(result, workload), fontsize=9, loc="left")
            for panel in panels[len(works) :]:
                panel.axis("off")
            part.suptitle(heading, fontsize=9, x=0.01, ha="left")

    figures = [
        [heading, _work(result, workload), *_drawn(result, workload, row)]
        for heading, works in groups.items()
        for result, workload, bars in works
        for row in bars
    ]
    caption = f"tokens/s of each contender on {device}, with quartiles"
    return Plot(f"{device}-speed", caption, figures, (4.6 * n_columns, sum(heights)), draw)


def _drawn(result: Mapping[str, Any], workload: str, row: Mapping[str, Any]) -> list[Any]:
    """What a bar shows."""
    contender = row["contender"]
    ratio = plotting.ratio_text(result, workload, contender)
    return [plotting.label(result, contender), row["tokens_per_s"], row["ceiling_tokens_per_s"], ratio]


def _order(work: tuple[Mapping[str, Any], str, list[Any]]) -> tuple[int, int, int]:
    result, workload, _ = work
    return WORKLOADS.index(workload), result["options"]["batch"], result["options"]["new_tokens"]


def _work(result: Mapping[str, Any], workload: str) -> str:
    options = result["options"]
    n_new = f" + {options['new_tokens']}" if workload == "decode" else ""
    return f"{workload}, {options['batch']} x {options['prompt_tokens']}{n_new} tokens"


def ceilings(device: str, results: Sequence[Mapping[str, Any]]) -> Plot:
    """Percent of the ceiling that fastgpt reaches, one panel for each workload, the smallest model on top."""
    bars: dict[str, list[tuple[str, float]]] = {}
    for result in sorted(results, key=lambda result: result["model"]["n_layer"] * result["model"]["n_embd"] ** 2):
        for row in result["results"]:
            if row["contender"] == OURS:
                work = _work(result, row["workload"]).partition(", ")[2]
                name = f"{Path(result['model']['name']).name}, {result['options']['dtype']}\n{work}"
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
            panel.set_ylim(n_bars - 0.5, -0.5)
            panel.set_title(workload, fontsize=10)
            panel.set_xlabel("percent of the ceiling")
            panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"fastgpt on {device}: how much of the ceiling measured in the same run it reaches", fontsize=10
        )

    n_bars = max(map(len, bars.values()))
    caption = f"percent of the measured ceiling that fastgpt reaches on {device}, by size"
    return Plot(f"{device}-ceiling", caption, bars, (4.6 * len(workloads), 1.5 + 0.5 * n_bars), draw)


# --- curves ---------------------------------------------------------------------------------------------------------


def memory(name: str, sizes: dict[str, list[dict[str, Any]]]) -> Plot:
    """Peak memory against the batch: a panel for each model and workload, a line for each contender."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for size, rows in sizes.items():
        for row in rows:
            if row.get("peak_memory_bytes") is not None:
                lines = panels.setdefault(f"{size}, {row['workload']} of {row['tokens']} tokens each", {})
                lines.setdefault(row["contender"], []).append((row["batch"], row["peak_memory_bytes"] / 1e9))
    return _curves(f"{name}-memory", f"peak memory against the batch, {name}", "sequences", "GB", panels)


def latency(name: str, sizes: dict[str, list[dict[str, Any]]]) -> Plot:
    """Time of a generated token against the context: a panel for each model, a line for each contender."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for size, rows in sizes.items():
        for row in rows:
            point = row["context"], 1000 * row["seconds_per_token"]["median"]
            panels.setdefault(f"{size}, one sequence", {}).setdefault(row["contender"], []).append(point)
    caption = f"time of a generated token against the context, {name}"
    return _curves(f"{name}-latency", caption, "tokens of context", "ms for a token", panels)


def _curves(
    name: str, caption: str, along: str, measure: str, panels: dict[str, dict[str, list[tuple[int, float]]]]
) -> Plot:
    """Both axes begin at 0, so that what grows in proportion looks like it."""

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (title, lines) in zip(axes, panels.items(), strict=True):
            for contender, points in lines.items():
                colour = plotting.COLOURS.get(contender, plotting.BASELINE_COLOUR)
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=contender)
            panel.set_xlim(left=0)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_ylim(0, 1.1 * max(value for points in lines.values() for _, value in points))
            panel.set_title(title, fontsize=10)
            panel.set_xlabel(along)
            panel.set_ylabel(measure)
            panel.spines[["top", "right"]].set_visible(False)
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
        )
        figure.suptitle(caption.replace(", ", "\n", 1), fontsize=10)

    return Plot(name, caption, panels, (4.6 * max(1, len(panels)), 3.6), draw)


# --- operations -----------------------------------------------------------------------------------------------------


def kernel_times(name: str, sizes: dict[str, list[dict[str, Any]]]) -> Plot:
    """Milliseconds of one call of every operation, forward and backward, stacked: fastgpt's above torch's.

    sizes: the rows of `fastgpt.bench.operations.measure` by the model's name. An operation that either
    contender lacks is left out of both, because otherwise their sums could not be compared.
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
        from matplotlib.patches import Patch

        panels = figure.subplots(len(times), 1, squeeze=False)[:, 0]
        for panel, (size, contenders) in zip(panels, times.items(), strict=True):
            for position, parts in enumerate(contenders.values()):
                left = 0.0
                for operation, ms in parts.items():
                    panel.barh(position, ms, left=left, color=colours[operation], height=0.62)
                    left += ms
                panel.text(left, position, f" {left:.2f} ms", va="center", fontsize=8, color=plotting.INK)
            panel.set_xlim(0, 1.2 * max(sum(parts.values()) for parts in contenders.values()))
            panel.set_yticks(range(len(contenders)), list(contenders))
            panel.invert_yaxis()
            panel.set_title(f"{size}: one call of each operation, forward and backward", fontsize=10)
            panel.set_xlabel("ms")
            panel.spines[["top", "right"]].set_visible(False)
        handles = [Patch(color=colour, label=operation) for operation, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)

    caption = f"milliseconds of one call of each operation, fastgpt's above torch's, {name}"
    return Plot(f"{name}-kernels", caption, times, (8.0, 0.8 + 1.7 * max(1, len(times))), draw)
