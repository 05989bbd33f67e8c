"""The pictures of the operations' READMEs. They explain; they measure nothing.

python docs/draw.py
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent / "pictures"
READ, OWN, WRITE, SKIP, MASK, INK = "#9ec5e8", "#f2b134", "#8fce9b", "#f1f1f1", "#e58f7b", "#333333"


def box(ax: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "", size: int = 9) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1))


def note(ax: Axes, x: float, y: float, text: str, ha: str = "left") -> None:
    ax.text(x, y, text, ha=ha, va="center", fontsize=9, color=INK)


def layer_norm(ax: Axes) -> None:
    for row in range(6):
        box(ax, 0, 5 - row, 6, 0.8, OWN if row == 2 else READ)
        box(ax, 10, 5 - row, 6, 0.8, OWN if row == 2 else WRITE)
    arrow(ax, (6.1, 3.4), (9.9, 3.4))
    note(ax, 3, 6.3, "x, rows of C channels", "center")
    note(ax, 13, 6.3, "y", "center")
    note(ax, 8, 4.1, "one program:\na row in registers", "center")
    for program in range(3):
        box(ax, 18, 4 - 1.5 * program, 4, 0.8, MASK, f"program {program}")
    arrow(ax, (22.1, 2.9), (24.4, 2.9))
    box(ax, 24.5, 2.5, 3, 0.8, WRITE, "dw, db")
    note(ax, 22, 6.3, "backward: partial sums per program,\nadded by a second kernel in a fixed order", "center")


def attention(ax: Axes) -> None:
    n = 6
    for query in range(n):
        for key in range(n):
            color = READ if key < query else MASK if key == query else SKIP
            box(ax, key, n - 1 - query, 1, 1, OWN if query == 4 and key < 4 else color)
    arrow(ax, (0.1, 1.5), (3.9, 1.5))
    note(ax, n / 2, n + 0.4, "blocks of keys", "center")
    ax.text(-0.4, n / 2, "blocks of queries", rotation=90, ha="center", va="center", fontsize=9, color=INK)
    box(ax, 7.5, 4.5, 0.6, 0.6, READ)
    note(ax, 8.4, 4.8, "every query sees every key: no comparison")
    box(ax, 7.5, 3.5, 0.6, 0.6, MASK)
    note(ax, 8.4, 3.8, "on the diagonal: compare positions")
    box(ax, 7.5, 2.5, 0.6, 0.6, SKIP)
    note(ax, 8.4, 2.8, "above it: never loaded")
    box(ax, 7.5, 1.3, 0.6, 0.6, OWN)
    kept = "the largest score, the sum of weights\nand the weighted sum of values"
    note(ax, 8.4, 1.2, f"one program walks its row of blocks and keeps for each query\n{kept}")


def gelu_mlp(ax: Axes) -> None:
    order = 0
    for col in range(4):
        for row in range(3):
            box(ax, col * 1.5, 4 - row * 1.2, 1.4, 1.1, OWN if (col, row) == (3, 1) else READ, str(order), 8)
            order += 1
    note(ax, 3, 5.6, "tiles of x W1, in the order of the walk", "center")
    arrow(ax, (6, 3.3), (8.4, 3.3))
    for part in range(4):
        box(ax, 8.5 + part * 1.3, 2.6, 1.2, 1.5, OWN)
    note(ax, 11, 5, "epilogue, a quarter of the columns at a time:\n+ bias, round to p, GELU", "center")
    arrow(ax, (13.8, 3.7), (16, 4.2))
    arrow(ax, (13.8, 3.0), (16, 2.5))
    box(ax, 16.1, 3.8, 4.2, 0.9, WRITE, "p, kept for backward")
    box(ax, 16.1, 2.1, 4.2, 0.9, WRITE, "h = GELU(p)")


def linear_cross_entropy(ax: Axes) -> None:
    for chunk in range(4):
        box(ax, 0, 4 - chunk, 2, 0.9, OWN if chunk == 1 else READ)
    note(ax, 1, 5.3, "hidden, in chunks of rows", "center")
    arrow(ax, (2.1, 3.4), (5.4, 3.4))
    note(ax, 3.75, 3.8, "times W^T", "center")
    box(ax, 5.5, 2.9, 8, 1, OWN, "logits of one chunk -> their gradient, in place")
    note(ax, 9.5, 4.5, "one buffer for all chunks; one program a row", "center")
    arrow(ax, (13.6, 3.6), (16.4, 4.3))
    arrow(ax, (13.6, 3.2), (16.4, 2.5))
    box(ax, 16.5, 4, 5.5, 0.9, WRITE, "rows of the gradient of hidden")
    box(ax, 16.5, 2, 5.5, 0.9, WRITE, "+= the gradient of W")
    arrow(ax, (9.5, 2.8), (9.5, 1.7))
    box(ax, 7.7, 0.8, 3.6, 0.9, WRITE, "loss of each row")


def sampling(ax: Axes) -> None:
    for group in range(8):
        box(ax, group * 2, 4, 1.9, 0.8, READ, "16", 8)
        arrow(ax, (group * 2 + 0.95, 3.9), (group * 2 + 0.95, 3.2))
        box(ax, group * 2 + 0.55, 2.4, 0.8, 0.7, OWN)
    note(ax, 8, 5.3, "scores of one row, 16 tokens a group; about 50 programs for 50,257 tokens", "center")
    note(ax, 16.3, 2.75, "best of each group, with noise where nothing filters")
    arrow(ax, (8, 2.3), (8, 1.5))
    box(ax, 6, 0.6, 4, 0.9, WRITE, "token")
    note(ax, 10.3, 1.05, "one program a row: threshold of top-k, top-p, min-p by search, then the best")


def decode_step(ax: Axes) -> None:
    kernels = ("norm + QKV", "attention,\nappend", "merge splits,\nprojection", "norm + FC\n+ GELU", "projection")
    for place, name in enumerate(kernels):
        box(ax, place * 4.4, 2, 3.6, 1.4, OWN, name)
        if place:
            arrow(ax, (place * 4.4 - 0.75, 2.7), (place * 4.4 - 0.05, 2.7))
        box(ax, place * 4.4 + 0.6, 4.2, 2.4, 0.8, READ, "cache" if place == 1 else "weights", 8)
        arrow(ax, (place * 4.4 + 1.8, 4.1), (place * 4.4 + 1.8, 3.5))
    box(ax, 0, 0.2, 21.2, 0.8, WRITE, "residual stream in float32; partial sums are added by whoever reads it next")
    for place in (0, 2, 3, 4):
        ends = (place * 4.4 + 1.8, 1.9), (place * 4.4 + 1.8, 1.1)
        arrow(ax, *(ends if place in (2, 4) else ends[::-1]))


def persistent_decode(ax: Axes) -> None:
    phases = ("QKV", 3, READ), ("attend", 2, OWN), ("proj.", 2, READ), ("FC", 4, READ), ("proj.", 4, READ)
    left = 2.6
    for name, n_tiles, color in phases:
        width = n_tiles * 0.95
        note(ax, left + width / 2, 5, name, "center")
        for program in range(3):
            for tile in range(n_tiles if color == READ else 1):
                tile_width = 0.9 if color == READ else width - 0.05
                box(ax, left + tile * 0.95, 3.6 - program * 1.2, tile_width, 0.8, color)
        left += width + 0.35
        ax.plot((left - 0.2, left - 0.2), (1, 4.7), color=MASK, linewidth=2)
    for program in range(3):
        note(ax, 0, 4 - program * 1.2, f"program {program}")
    note(ax, 2.6, 5.7, "tiles of weights in blue, one stream for each program; barriers of all programs in red")
    note(ax, 2.6, 0.4, "the loads of the next tiles are under way while a program waits at a barrier")


PICTURES: dict[str, tuple[Callable[[Axes], None], tuple[float, float]]] = {
    "layer_norm": (layer_norm, (28, 7)),
    "attention": (attention, (19, 7)),
    "gelu_mlp": (gelu_mlp, (20.5, 6.5)),
    "linear_cross_entropy": (linear_cross_entropy, (22.2, 6)),
    "sampling": (sampling, (28, 6)),
    "decode_step": (decode_step, (21.4, 5.5)),
    "persistent_decode": (persistent_decode, (20, 6.2)),
}


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "fastgpt"  # the same file from the same picture
    for name, (draw, (width, height)) in PICTURES.items():
        figure, ax = plt.subplots(figsize=(0.42 * width, 0.42 * height))
        draw(ax)
        ax.set(xlim=(-0.8, width), ylim=(-0.3, height))
        ax.set_axis_off()
        figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
