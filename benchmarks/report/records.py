"""What a file of results holds.

A file of `fastgpt bench` or `benchmarks cpu` holds one benchmark of whole models. A file of `benchmarks gpu` holds
steps with their parts. Unknown steps are ignored.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..peers.contenders import CPU_PEERS

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One file of results."""

    file: Path
    content: dict[str, Any]

    @property
    def device(self) -> str:
        """The name of the file's folder."""
        return self.file.parent.name

    @property
    def name(self) -> str:
        """The device and the file's name, with which the names of its plots begin."""
        return f"{self.device}-{self.file.stem}"


def load(folder: Path) -> list[Result]:
    """Every result in a folder, by device and name; predictions are none.

    Raises ValueError if a file holds a dry run or no result.
    """
    files = [file for file in sorted(folder.glob("*/*.json")) if file.parent.name != "predicted"]
    results = [Result(file, json.loads(file.read_text())) for file in files]
    for result in results:
        if result.content.get("dry_run"):
            raise ValueError(f"{result.file} is a dry run: its times say nothing")
        if "environment" not in result.content and "results" not in result.content:
            raise ValueError(f"{result.file} is the result neither of fastgpt bench nor of benchmarks.gpu.command")
    return results


def benchmarks(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Benchmarks of whole models with exact weights by step and part; that of `fastgpt bench` has the name ""."""
    found = {f"{step}, {part}": inner for step, part, inner in _parts(content) if "results" in inner}
    return {name: _exact(inner) for name, inner in (({"": content} if "results" in content else {}) | found).items()}


def _exact(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A benchmark without the contenders whose weights are rounded."""
    rounded = {row["contender"] for row in content["results"] if "logit_error" in row} - CPU_PEERS.keys()
    return {
        **content,
        "results": [row for row in content["results"] if row["contender"] not in rounded],
        "ratios": [row for row in content["ratios"] if row["baseline"] not in rounded],
    }


def quantized(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Benchmarks with int8 or int4 weights, by the model's name and the tokens."""
    if not content.get("quantized_ratios"):
        return {}
    options = content["options"]
    return {f"{Path(options['model']).name}, {options['batch']} x {options['prompt_tokens']} tokens": content}


def operations(content: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Rows of operations by the model's size. An operation that failed has a row with its fault."""
    sizes: dict[str, list[Row]] = {}
    for step, operation, inner in _parts(content):
        kind, _, size = step.partition(" ")
        if kind in ("kernels", "steps"):
            rows = [{"operation": operation} | inner] if "fault" in inner else inner
            sizes.setdefault(size, []).extend(rows)
    return sizes


def curve(content: Mapping[str, Any], kind: str) -> dict[str, list[Row]]:
    """Points of "memory" against the batch or "latency" against the context, by the model's size."""
    sizes: dict[str, list[Row]] = {}
    for step, _, inner in _parts(content):
        if step.startswith(f"{kind} ") and "fault" not in inner:
            sizes.setdefault(step.removeprefix(f"{kind} "), []).extend(inner)
    return sizes


def traffic(content: Mapping[str, Any]) -> dict[str, list[Row]]:
    """What moves memory in a step, by the model's size and the step."""
    return {
        f"{step.removeprefix('traffic ')}, {part}": inner
        for step, part, inner in _parts(content)
        if step.startswith("traffic ")
    }


def products(content: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The library's matrix products by the model's size."""
    return {
        part.removeprefix("products "): inner
        for step, part, inner in _parts(content)
        if step == "ceilings" and part.startswith("products ") and "fault" not in inner
    }


def cold_starts(content: Mapping[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """Cold starts by the model's size, "fresh" and "warm"."""
    return {
        part: inner for step, part, inner in _parts(content) if step.startswith("cold start ") and "fault" not in inner
    }


def lookups(content: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Texts generated with and without prompt lookup, by model."""
    return {step.removeprefix("lookup "): inner for step, _, inner in _parts(content) if step.startswith("lookup ")}


def forwards(content: Mapping[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """Forwards of several tokens by model and dtype."""
    return {
        step.removeprefix("forwards "): dict(parts) for step, parts in content.items() if step.startswith("forwards ")
    }


def faults(content: Mapping[str, Any]) -> list[str]:
    """What failed, by step and part."""
    return [f"{step}, {part}: {inner['fault']}" for step, part, inner in _parts(content) if "fault" in inner]


def _parts(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(step, part, content) of every part whose content is more than a number or a word."""
    for step, parts in content.items():
        for part, inner in parts.items() if isinstance(parts, Mapping) else ():
            if isinstance(inner, Mapping | list):
                yield step, part, inner
