"""The page of predictions, docs/predicted.md, from the newest file of predictions: `python -m ptx.predicted`.

Predicted, not measured. The products that are left to torch are added by their FLOPs and bytes alone.
"""

import json
from collections.abc import Iterator
from typing import Any

from paths import ROOT

from fastgpt import accounting

from . import model
from .workloads import C, F, L, V

RESULTS, PAGE = ROOT / "benchmarks/results/predicted", ROOT / "docs/predicted.md"
_BEGIN, _END = "<!-- predicted: written by python -m ptx.predicted -->", "<!-- /predicted -->"
_ROWS = {"prefill 1 x 1024": 1024, "decode, batch 64": 64, "training 16 x 1024": 16 * 1024}
_BY_TORCH = "products by torch"


def products(workload: str) -> Iterator[tuple[int, int, int, int]]:
    """Rows, inner axis, columns and number of the products that a workload leaves to torch, in bfloat16."""
    if workload == "decode, batch 1":
        return
    rows = _ROWS[workload]
    if workload == "decode, batch 64":
        yield rows, C, V, 1
        return
    n = 3 if workload.startswith("training") else 1  # Backward has two for each of forward.
    yield rows, C, 3 * C, n * L
    yield rows, C, C, n * L
    yield (1 if workload.startswith("prefill") else rows), C, V, n
    if n == 3:
        yield rows, C, F, 3 * L  # two gradients of weights, one of the MLP's input


def product_seconds(rows: int, inner: int, columns: int, gpu: model.Gpu) -> float:
    """At the rate of a large product, which was measured on an H200 and is assumed for an H100."""
    n_bytes = 2 * (rows * inner + inner * columns + rows * columns)
    arithmetic_s = 2 * rows * inner * columns / accounting.H200_MATRIX_RATE
    return max(arithmetic_s, n_bytes / gpu.bandwidth) + gpu.launch_s


def table(content: dict[str, Any]) -> str:
    """The kernels of each workload with their predicted time and what limits it, and the sum."""
    names = [gpu.name for gpu in (model.H100, model.H200)]
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in content["kernels"]):
        found = [row for row in content["kernels"] if row["workload"] == workload]
        torchs = {
            gpu.name: sum(
                n * product_seconds(rows, inner, columns, gpu) for rows, inner, columns, n in products(workload)
            )
            for gpu in (model.H100, model.H200)
        }
        totals = {name: torchs[name] + sum(r["times"] * r["predicted_s"][name] for r in found) for name in names}
        lines += [
            f"**{workload}**: {1e3 * totals[names[0]]:.2f} ms on an H100, {1e3 * totals[names[1]]:.2f} ms on an H200",
            "",
            "| kernel | launches | H100, us | H200, us | limit on an H200 | next, us | memory, us | passes |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in found:
            on_h200 = row["limits_s"][names[1]]
            (limit, _), (following, next_s), *_ = on_h200.items()
            counts = row["counts"]
            fewest = counts.get("fewest shared passes", 0)
            passes = f"{counts['shared passes'] / fewest:.1f}" if fewest else "-"
            times = " | ".join(f"{1e6 * row['predicted_s'][name]:.1f}" for name in names)
            lines.append(
                f"| `{row['kernel'].removeprefix('_')}` | {row['times']} | {times} | {limit} |"
                f" {following} {1e6 * next_s:.1f} | {1e6 * on_h200['memory']:.1f} | {passes} |"
            )
        if any(torchs.values()):
            times = " | ".join(f"{1e6 * torchs[name]:.0f}" for name in names)
            lines.append(f"| {_BY_TORCH}, together | {sum(n for *_, n in products(workload))} | {times} | | | | |")
        lines.append("")
    return "\n".join(lines)


def page(text: str, content: dict[str, Any]) -> str:
    """The page with its table written again."""
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    about = f"Of {content['date']}, commit {content['commit'][:7]}, triton {content['triton']}."
    return f"{before}{_BEGIN}\n\n{about}\n\n{table(content)}\n{_END}{after}"


def newest() -> dict[str, Any]:
    return json.loads(max(RESULTS.glob("*.json")).read_text())


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(), newest()))


if __name__ == "__main__":
    main()
