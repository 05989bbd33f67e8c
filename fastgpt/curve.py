"""The losses of a training run as a PNG."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

COLOURS = {"loss": ("training", "#8a94a6"), "eval_loss": ("validation", "#0f9d77")}


def draw_curve(history: Sequence[Mapping[str, float]], file: Path) -> None:
    """Draw the losses over the steps, if matplotlib is installed. history: entries with a step and a loss."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for key, (label, colour) in COLOURS.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            panel.plot(
                *zip(*points, strict=True), label=label, color=colour, marker="o" if key == "eval_loss" else None
            )
    panel.set_xlabel("step")
    panel.set_ylabel("loss, nats per token")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(file, dpi=160, format="png")
