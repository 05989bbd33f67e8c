"""The tables of the documentation, from results, as Markdown."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastgpt.bench import SCHEMA, machine, plotting
from fastgpt.bench.workloads import OURS, WORKLOADS
from fastgpt.load import DTYPES

from ..peers.contenders import CPU_PEERS
from .records import (
    Result,
    Row,
    benchmarks,
    cold_starts,
    curve,
    forwards,
    lookups,
    operations,
    products,
    quantized,
    traffic,
)

RESULTS = Path("benchmarks/results")
_BASELINES = {
    "hf-eager": "transformers eager",
    "hf-sdpa": "transformers sdpa",
    "hf-compile": "transformers sdpa, torch.compile",
}
_LIBRARIES = ("torch", "triton", "transformers")
_VERSIONS = (*_LIBRARIES, *CPU_PEERS)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. A bar within a cell is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


# --- whole models ---------------------------------------------------------------------------------------------------


def speed_tables(results: Sequence[Result]) -> list[str]:
    """A heading and a table for all benchmarks of one model on one machine."""
    groups: dict[str, list[tuple[Result, Mapping[str, Any]]]] = {}
    for result in results:
        for content in benchmarks(result.content).values():
            groups.setdefault(_terms(result, content), []).append((result, content))
    return [block for heading, group in groups.items() for block in (heading, _speed_table(group))]


def _terms(result: Result, content: Mapping[str, Any], named: Sequence[str] = _VERSIONS) -> str:
    """What results in one table have in common. named: the packages whose versions it says."""
    model = content["model"]
    name = Path(model["name"]).name
    weights = "its own weights" if model["weights"] == "loaded" else f"{model['weights']} weights"
    where = _where(content["machine"], content["versions"], named)
    return f"**{result.device.upper()}**: {where}. {content['path'].capitalize()} path, {name} with {weights}."


def _where(machine: Mapping[str, Any], versions: Mapping[str, str], named: Sequence[str] = _VERSIONS) -> str:
    place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads ({machine['cpu_capability']})"
    return f"{place}; " + ", ".join(f"{name} {versions[name]}" for name in named if versions.get(name))


def _speed_table(group: Sequence[tuple[Result, Mapping[str, Any]]]) -> str:
    contenders = dict.fromkeys(row["contender"] for _, content in group for row in content["results"])
    baselines = [name for name in contenders if name != OURS]
    ours = [
        (result, content, row) for result, content in group for row in content["results"] if row["contender"] == OURS
    ]

    def order(entry: tuple[Result, Mapping[str, Any], Row]) -> tuple[int, int, int]:
        options = entry[1]["options"]
        return WORKLOADS.index(entry[2]["workload"]), options["batch"], list(DTYPES).index(options["dtype"])

    rows = []
    for result, content, row in sorted(ours, key=order):
        ratios = [plotting.ratio_text(content, row["workload"], name) or "-" for name in baselines]
        speed = row["tokens_per_s"]["median"]
        figures = f"{speed:,.{0 if speed >= 100 else 1}f}", f"{row['percent_of_ceiling']:.0f}%"
        rows.append([describe_work(content, row["workload"]), *figures, *ratios, f"`{result.file.name}`"])
    headings = [f"compared with {_BASELINES.get(name, name)}" for name in baselines]
    folder = (RESULTS / group[0][0].device).as_posix()
    return markdown_table(["workload", "fastgpt", "of ceiling", *headings, f"file in `{folder}/`"], rows)


def headline(results: Sequence[Result]) -> str:
    """A heading and a short table of one sequence at a time: of a GPU if there are results of one, of the newest."""
    device = "gpu" if any(result.device == "gpu" and benchmarks(result.content) for result in results) else "cpu"
    chosen: dict[tuple[int, int], tuple[str, list[str]]] = {}
    for result in sorted(results, key=_timestamp, reverse=True):
        for content in benchmarks(result.content).values() if result.device == device else ():
            options = content["options"]
            for row in content["results"] if options["batch"] == 1 else ():
                ratio = plotting.ratio_text(content, row["workload"], "hf-sdpa")
                place = WORKLOADS.index(row["workload"]), list(DTYPES).index(options["dtype"])
                if row["contender"] == OURS and ratio:
                    speed = row["tokens_per_s"]["median"]
                    figures = [describe_work(content, row["workload"]), f"{speed:,.{0 if speed >= 100 else 1}f}", ratio]
                    chosen.setdefault(place, (_terms(result, content, _LIBRARIES), figures))
    if not chosen:
        return "Nothing yet."
    headings = ["workload", "fastgpt, tokens/s", "compared with transformers sdpa"]
    (heading, _), *_ = chosen.values()
    rows = [figures for _, (terms, figures) in sorted(chosen.items()) if terms == heading]
    return f"{heading}\n\n{markdown_table(headings, rows)}"


def _timestamp(result: Result) -> str:
    """Of the newest benchmark in a file; empty without any."""
    return max((content["timestamp"] for content in benchmarks(result.content).values()), default="")


def describe_work(content: Mapping[str, Any], workload: str) -> str:
    """The options of a benchmark of whole models, in words."""
    options = content["options"]
    tokens = f"{options['batch']} x {options['prompt_tokens']}"
    what = f"{workload} of {tokens}" if workload != "decode" else f"decode of {options['new_tokens']} after {tokens}"
    return f"{what}, {options['dtype']}, {options['runs']} runs"


# --- curves and cold start ------------------------------------------------------------------------------------------


def detail_tables(results: Sequence[Result]) -> list[str]:
    """A heading and a table for everything that was measured in addition to the speed of whole models."""
    kinds: list[tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]], Callable[[Any], str]]] = [
        ("Operations", operations, _operation_table),
        ("The library's products", products, _product_table),
        ("Peak memory", lambda content: curve(content, "memory"), _memory_table),
        ("Time of a token", lambda content: curve(content, "latency"), _latency_table),
        ("Bytes, counted and not measured,", traffic, _traffic_table),
        ("int8 and int4 weights", quantized, _quantized_table),
        ("Cold start", cold_starts, _cold_start_table),
        ("Prompt lookup", lookups, _lookup_table),
        ("Forwards of several tokens", forwards, _forward_table),
    ]
    blocks = []
    for result in results:
        file = f"`{(RESULTS / result.device / result.file.name).as_posix()}`"
        place = result.content.get("environment", result.content)
        for kind, sizes_of, table in kinds:
            for size, rows in sizes_of(result.content).items():
                where = _where(place["machine"], place["versions"])
                blocks += [f"**{kind} of {size}**: {where}. {file}", table(rows)]
    return blocks


def publish(file: Path, parts: Mapping[str, Any]) -> None:
    """Write what was measured on the CPU at hand to a file, and print its tables."""
    environment = {"machine": machine.describe(torch.device("cpu")), "versions": machine.versions()}
    content = {"schema": SCHEMA, "environment": environment, **parts}
    file.write_text(json.dumps(content, indent=2) + "\n")
    for block in detail_tables([Result(file, content)]):
        print(block, end="\n\n")


def _memory_table(rows: Sequence[Row]) -> str:
    table = []
    for workload, points in groupby(rows, key=lambda row: row["workload"]):
        for (batch, tokens), pair in groupby(points, key=lambda row: (row["batch"], row["tokens"])):
            peaks = {row["contender"]: row.get("peak_memory_bytes") for row in pair}
            ours, theirs = peaks.get(OURS), peaks.get("hf-sdpa")
            ratio = f"{ours / theirs:.2f}x" if ours and theirs else "-"
            table.append([f"{workload} of {batch} x {tokens}", _gigabytes(ours), _gigabytes(theirs), ratio])
    return markdown_table(["work", "fastgpt, GB", "transformers sdpa, GB", "fastgpt needs"], table)


def _traffic_table(rows: Sequence[Row]) -> str:
    sums = {name: sum(row["bytes"] for row in rows if row["contender"] == name) for name in (OURS, "hf-sdpa")}
    bytes_of = {(row["contender"], row["source"]): row["bytes"] for row in rows}
    shown = dict.fromkeys(row["source"] for row in rows if row["bytes"] >= 0.001 * sums[row["contender"]])
    table = [[f"`{source}`", *(_gigabytes(bytes_of.get((name, source))) for name in sums)] for source in shown]
    table.append(["all, with what is below a thousandth", *map(_gigabytes, sums.values())])
    return markdown_table(["what reads and writes", "fastgpt, GB", "transformers sdpa, GB"], table)


def _quantized_table(content: Mapping[str, Any]) -> str:
    """fastgpt in floats and everyone who rounds: speeds, and how far the logits are from those of the float weights."""
    table = []
    ours = list(dict.fromkeys(entry["contender"] for entry in content["quantized_ratios"]))
    for row in content["results"]:
        if row["contender"] != OURS and "logit_error" not in row:
            continue
        ratios = [
            plotting.with_quartiles(entry)
            for name in ours
            for entry in content["quantized_ratios"]
            if (entry["workload"], entry["contender"], entry["baseline"]) == (row["workload"], name, row["contender"])
        ]
        errors = [f"{row[name]:.2g}" if name in row else "-" for name in ("logit_error", "kl_divergence")]
        speed = f"{row['tokens_per_s']['median']:,.0f}"
        table.append([row["workload"], row["contender"], speed, *errors, *(ratios or ["-"] * len(ours))])
    headings = ["tokens/s", "error of logits", "KL divergence, nats", *(f"{name} is" for name in ours)]
    return markdown_table(["workload", "contender", *headings], table)


def _gigabytes(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 1e9:.2f}"


def _latency_table(rows: Sequence[Row]) -> str:
    table = []
    for context, pair in groupby(rows, key=lambda row: row["context"]):
        taken = {row["contender"]: 1000 * row["seconds_per_token"]["median"] for row in pair}
        ours, theirs = taken[OURS], taken["hf-sdpa"]
        table.append([f"{context:,}", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}x"])
    return markdown_table(["context", "fastgpt, ms", "transformers sdpa, ms", "fastgpt is"], table)


def _cold_start_table(starts: Mapping[str, Sequence[Row]]) -> str:
    table = []
    for kind, rows in starts.items():
        parts = [f"{median(row[name] for row in rows):.1f}" for name in ("total_s", "model_s", "token_s")]
        table.append([f"{'nothing' if kind == 'fresh' else 'everything'} compiled before", str(len(rows)), *parts])
    return markdown_table(["kernels", "starts", "to the first token, s", "of it the model", "and the token"], table)


def _lookup_table(rows: Sequence[Row]) -> str:
    table = []
    for (text, dtype), group in groupby(rows, key=lambda row: (row["text"], row["dtype"])):
        plain, *looked_up = group
        slow = plain["tokens_per_s"]["median"]
        for row in looked_up:
            gain = row["tokens_per_s"]["median"] / slow
            figures = (
                f"{row['tokens_per_forward']:.2f}",
                f"{gain:.2f}x",
                f"{row['equal_tokens']} of {row['new_tokens']}",
            )
            table.append([text, dtype, str(row["proposed"]), f"{slow:,.0f}", *figures])
    headings = ["text", "dtype", "proposed", "tokens/s without", "tokens a forward with", "gain", "equal tokens"]
    return markdown_table(headings, table)


def _forward_table(dtypes: Mapping[str, Sequence[Row]]) -> str:
    table = []
    for dtype, rows in dtypes.items():
        taken = [1000 * row["seconds"]["median"] for row in rows]
        cells = [f"{ms:.1f} ms ({ms / taken[0]:.2f}x)" for ms in taken]
        table.append([f"{dtype}, after {rows[0]['context']}", *cells])
    counts = [str(row["tokens"]) for row in next(iter(dtypes.values()))]
    return markdown_table(["tokens of a forward", *counts], table)


# --- operations -----------------------------------------------------------------------------------------------------


def _operation_table(rows: Sequence[Row]) -> str:
    """The time of each operation and pass, of fastgpt, of torch and of the fastest other contender."""
    table = []
    for (operation, direction), contenders in _by_pass(rows).items():
        ours = contenders.get(OURS, {})
        if "median_s" not in ours:
            why = ours.get("fault") or ours.get("skipped", "not run")
            table.append([operation, direction, why, "-", "-", "-"])
            continue
        others = {name: row["median_s"] for name, row in contenders.items() if name != OURS and "median_s" in row}
        fastest = min(others, key=lambda name: others[name], default=None)
        table.append(
            [
                operation,
                direction,
                f"{1000 * ours['median_s']:.3f}",
                f"{ours['share_of_floor']:.0%}",
                f"{others['torch'] / ours['median_s']:.2f}x" if "torch" in others else "-",
                f"{others[fastest] / ours['median_s']:.2f}x ({fastest})" if fastest else "-",
            ]
        )
    baselines = "compared with torch", "compared with the fastest other"
    headings = ["operation", "pass", "fastgpt, ms", "of the floor", *baselines]
    absent = dict.fromkeys(row["contender"] for row in rows if "contender" in row and "direction" not in row)
    return markdown_table(headings, table) + (f"\n\nNot run: {', '.join(absent)}." if absent else "")


def _by_pass(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by (operation, pass) and contender. A finding about a whole operation is listed under fastgpt."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "direction" in row or "contender" not in row:
            key = row["operation"], row.get("direction", "all")
            groups.setdefault(key, {})[row.get("contender", OURS)] = row
    return groups


def _product_table(rows: Sequence[Row]) -> str:
    counts = list(dict.fromkeys(row["rows"] for row in rows))
    table = []
    for name, group in groupby(rows, key=lambda row: row["product"]):
        by_count = {row["rows"]: row for row in group}
        sizes = next(iter(by_count.values()))
        rates = [
            f"{by_count[n]['flops_per_s'] / 1e12:.1f} TFLOP/s, {by_count[n]['bytes_per_s'] / 1e9:,.0f} GB/s"
            for n in counts
        ]
        table.append([f"{name}, {sizes['in']:,} to {sizes['out']:,}", *rates])
    return markdown_table(["product", *(f"rows: {n:,}" for n in counts)], table)
