"""A benchmark's result as tables on a terminal and as bars in a PNG."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours on a white background, so that light and dark pages show the same picture.
COLOURS = {"fastgpt": "#0f9d77"}
BASELINE_COLOUR = "#8a94a6"
INK = "#333333"

# --- table ----------------------------------------------------------------------------------------------------------


def render(result: Mapping[str, Any], console: Console) -> None:
    """Print a benchmark's result as a table, with notes on inputs and machine, on a rich console."""
    table = Table(title=title(result), title_justify="left")
    table.add_column("workload")
    table.add_column("contender")
    for heading in ("tokens/s", "min - max", "fastgpt is", "of ceiling", "peak memory", "first run"):
        table.add_column(heading, justify="right")
    for workload, rows in by_workload(result).items():
        for row in rows:
            speed = row["tokens_per_s"]
            table.add_row(
                workload,
                label(result, row["contender"]),
                f"{speed['median']:,.1f}",
                f"{speed['min']:,.1f} - {speed['max']:,.1f}",
                ratio_text(result, workload, row["contender"]),
                f"{row['percent_of_ceiling']:.0f}%",
                _memory(row["peak_memory_bytes"]),
                f"{row['first_run_s']:.2f} s",
            )
        table.add_section()
    console.print(table)
    for line in notes(result):
        console.print(line, highlight=False, style="dim")


def title(result: Mapping[str, Any]) -> str:
    """Model, dtype and device, in a line."""
    options, weights = result["options"], result["model"]["weights"]
    name = os.path.basename(os.path.normpath(result["model"]["name"]))
    return f"{name} ({weights} weights), {options['dtype']} on {options['device']}"


def label(result: Mapping[str, Any], contender: str) -> str:
    """A contender's name; for ours with the path that ran."""
    if contender != "fastgpt":
        return contender
    return "fastgpt (torch path)" if result["path"] == "torch" else "fastgpt (kernels)"


def notes(result: Mapping[str, Any]) -> list[str]:
    """Lines that let a reader judge the figures: inputs, method, machine, parity, skipped contenders."""
    options, machine, rates = result["options"], result["machine"], result["rates"]
    lines = [
        f"batch {options['batch']}, {options['prompt_tokens']} tokens, decode adds {options['new_tokens']}; median of "
        f"{options['runs']} interleaved runs; ratios are medians of each round's, in brackets their quartiles; "
        "the first run includes compiling",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads; measured "
        f"{rates['bandwidth'] / 1e9:,.1f} GB/s and {rates['matrix_rate'] / 1e12:,.2f} TFLOP/s",
    ]
    if inference := result["gate"].get("inference"):
        lines.append(
            f"parity: logits differ by {inference['logit_difference']:.2g} from transformers' (largest "
            f"{inference['largest_logit']:.3g}), {_greedy(inference)}"
        )
    if training := result["gate"].get("training"):
        lines.append(
            f"parity: without dropout, a training step's loss differs by {training['loss_difference']:.1g} and its "
            f"gradient by {training['gradient_difference']:.1g} of its size; timed with dropout {_dropout(result)}"
        )
    return lines + [f"skipped {row['baseline']} in {row['workload']}: {row['reason']}" for row in result["skipped"]]


def _greedy(inference: Mapping[str, Any]) -> str:
    n_equal, n_tokens = inference["greedy_tokens_equal"], inference["greedy_tokens"]
    return f"{n_equal} of {n_tokens} greedy tokens equal" + (", then logits tie" if n_equal < n_tokens else "")


def by_workload(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of a result, one for each contender, by workload."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["results"]:
        groups.setdefault(row["workload"], []).append(row)
    return groups


def ratio_text(result: Mapping[str, Any], workload: str, contender: str) -> str:
    """How many times as fast ours is as a contender, with quartiles; empty for ours."""
    for ratio in result["ratios"]:
        if (ratio["workload"], ratio["baseline"]) == (workload, contender):
            return with_quartiles(ratio)
    return ""


def with_quartiles(ratio: Mapping[str, Any]) -> str:
    """The median of the rounds' ratios, and in brackets their quartiles."""
    paired = ratio["paired"]
    return f"{paired['median']:.2f}x ({paired['quartile_1']:.2f} - {paired['quartile_3']:.2f})"


def _dropout(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {p}" for part, p in result["model"]["dropout"].items())


def _memory(n_bytes: int | None) -> str:
    return "n/a" if n_bytes is None else f"{n_bytes / 2**20:,.0f} MiB"


# --- plot -----------------------------------------------------------------------------------------------------------


def plot(results: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw tokens/s of every contender as a PNG: one row per result, one panel per workload.

    Bars are medians and whiskers quartiles; a dashed line is the ceiling, if it is within the axis.
    Raises ValueError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    groups = [by_workload(result) for result in results]
    heights = [1.5 + 0.55 * max(map(len, group.values())) for group in groups]
    figure = Figure(figsize=(4.6 * len(groups[0]), sum(heights)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(results), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, result, group in zip(parts, results, groups, strict=True):
        panels = part.subplots(1, len(group), squeeze=False)[0]
        for panel, (workload, rows) in zip(panels, group.items(), strict=True):
            draw(panel, result, workload, rows)
        machine, batch = result["machine"], result["options"]["batch"]
        part.suptitle(f"{title(result)}, batch {batch} - {machine['gpu'] or machine['cpu']}", fontsize=10)
    figure.savefig(path, dpi=160, format="png")


def draw(panel: "Axes", result: Mapping[str, Any], workload: str, rows: list[Mapping[str, Any]]) -> None:
    """One workload's bars of tokens/s on a matplotlib panel."""
    speeds = [row["tokens_per_s"] for row in rows]
    medians = [speed["median"] for speed in speeds]
    ends = [speed["quartile_3"] for speed in speeds]
    whiskers = [
        [speed["median"] - speed["quartile_1"] for speed in speeds],
        [speed["quartile_3"] - speed["median"] for speed in speeds],
    ]
    colours = [COLOURS.get(row["contender"], BASELINE_COLOUR) for row in rows]
    panel.barh(range(len(rows)), medians, xerr=whiskers, color=colours, ecolor=INK, capsize=3, height=0.62)
    for position, (row, speed, end) in enumerate(zip(rows, medians, ends, strict=True)):
        ratio = ratio_text(result, workload, row["contender"]).partition(" ")[0]
        text = f"{speed:,.0f}" + (f"  (fastgpt: {ratio})" if ratio else "")
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the ceiling's line behind the text
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        panel.annotate(text, (end, position), **place, fontsize=8, color=INK, bbox=ground)
    limit = 1.5 * max(ends)
    ceiling = rows[0]["ceiling_tokens_per_s"]
    if ceiling < limit:
        panel.axvline(ceiling, color=INK, linestyle="--", linewidth=1, zorder=0)
        top = panel.get_xaxis_transform()
        panel.text(ceiling, 1.0, "ceiling", transform=top, fontsize=8, color=INK, ha="center", va="bottom")
    panel.set_xlim(0, limit)
    panel.set_yticks(range(len(rows)), [label(result, row["contender"]).replace(" (", "\n(") for row in rows])
    panel.invert_yaxis()
    panel.set_title(workload, fontsize=10, loc="left")
    panel.set_xlabel("tokens/s")
    panel.spines[["top", "right"]].set_visible(False)
