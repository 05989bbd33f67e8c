"""The tables and plots of the documentation, written from `benchmarks/results` alone.

python -m benchmarks.report            # rewrite the tables between their markers, and the plots
python -m benchmarks.report --check    # exit 1 where they and the results disagree
python -m benchmarks.report --paper    # print what the formulas predict
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgpt import plotting
from fastgpt.generation import DTYPES
from fastgpt.workloads import OURS, WORKLOADS

from . import paper, plots
from .peers import CPU_PEERS
from .tables import markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")
PLOTS = RESULTS / "plots"
_BASELINES = {
    "hf-eager": "transformers eager",
    "hf-sdpa": "transformers sdpa",
    "hf-compile": "transformers sdpa, torch.compile",
}

_VERSIONS = ("torch", "triton", "transformers", *CPU_PEERS)

# --- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One file of results and what it holds: whole models (of `fastgpt bench`) or operations (of `benchmarks.gpu`)."""

    file: Path
    content: dict[str, Any]

    @property
    def device(self) -> str:
        """The folder that it lies in."""
        return self.file.parent.name

    @property
    def is_of_models(self) -> bool:
        return "results" in self.content

    @property
    def sizes(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of operations by the model's name."""
        prefix = "kernels "
        return {key.removeprefix(prefix): rows for key, rows in self.content.items() if key.startswith(prefix)}


def load(folder: Path) -> list[Result]:
    """Every result in a folder, by device and name. Raises ValueError on a file that holds none that may be quoted."""
    results = [Result(file, json.loads(file.read_text())) for file in sorted(folder.glob("*/*.json"))]
    for result in results:
        if result.content.get("dry_run"):
            raise ValueError(f"{result.file} is a dry run: its times say nothing")
        if not result.is_of_models and not result.sizes:
            raise ValueError(f"{result.file} is the result neither of fastgpt bench nor of benchmarks.gpu")
    return results


def _grouped(results: Sequence[Result], heading: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(heading(result), []).append(result)
    return groups


# --- the README's section -------------------------------------------------------------------------------------------


def measured(results: Sequence[Result]) -> str:
    """A table for all that was measured on the same terms, then the plots."""
    of_models = [result for result in results if result.is_of_models]
    blocks: list[str] = []
    for heading, group in _grouped(of_models, _terms).items():
        blocks += [heading, _speed_table(group)]
    for result in results:
        for size, rows in result.sizes.items():
            blocks += [_operation_terms(result, size), _operation_table(rows)]
    blocks += [f"![{plot.caption}]({(PLOTS / plot.name).as_posix()}.svg)" for plot in all_plots(results)]
    return "\n\n".join(blocks)


def _terms(result: Result) -> str:
    content = result.content
    model, options = content["model"], content["options"]
    name = Path(model["name"]).name
    weights = "its own weights" if model["weights"] == "loaded" else f"{model['weights']} weights"
    work = f"batch {options['batch']}, {options['prompt_tokens']} tokens"
    where = _where(content["machine"], content["versions"])
    return f"**{result.device.upper()}**: {where}. {content['path'].capitalize()} path, {name} with {weights}, {work}."


def _where(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads ({machine['cpu_capability']})"
    return f"{place}; " + ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions)


def _speed_table(results: Sequence[Result]) -> str:
    contenders = dict.fromkeys(row["contender"] for result in results for row in result.content["results"])
    baselines = [name for name in contenders if name != OURS]
    headings = [f"beside {_BASELINES.get(name, name)}" for name in baselines]
    folder = (RESULTS / results[0].device).as_posix()
    ours = [(result, row) for result in results for row in result.content["results"] if row["contender"] == OURS]

    def order(entry: tuple[Result, dict[str, Any]]) -> tuple[int, int]:
        return list(DTYPES).index(entry[0].content["options"]["dtype"]), WORKLOADS.index(entry[1]["workload"])

    rows = []
    for result, row in sorted(ours, key=order):
        options, workload = result.content["options"], row["workload"]
        n_new = f" of {options['new_tokens']} tokens" if workload == "decode" else ""
        what = f"{workload}{n_new}, {options['dtype']}, {options['runs']} runs"
        ratios = [plotting.ratio_text(result.content, workload, name) or "-" for name in baselines]
        speed = row["tokens_per_s"]["median"]
        digits = 0 if speed >= 100 else 1
        rows.append([what, f"{speed:,.{digits}f}", *ratios, f"`{result.file.name}`"])
    return markdown_table(["workload", "fastgpt", *headings, f"file in `{folder}/`"], rows)


def _operation_terms(result: Result, size: str) -> str:
    environment = result.content["environment"]
    file = f"`{(RESULTS / result.device / result.file.name).as_posix()}`"
    return f"**Operations of {size}**: {_where(environment['machine'], environment['versions'])}. {file}"


def _operation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """fastgpt's time of each operation and pass beside torch's and that of the fastest other contender."""
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
    headings = ["operation", "pass", "fastgpt, ms", "of the floor", "beside torch", "beside the fastest other"]
    return markdown_table(headings, table)


def _by_pass(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """Rows by (operation, pass) and contender; a finding about the whole operation is fastgpt's."""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        key = row["operation"], row.get("direction", "all")
        groups.setdefault(key, {})[row.get("contender", OURS)] = row
    return groups


# --- plots ----------------------------------------------------------------------------------------------------------


def all_plots(results: Sequence[Result]) -> list[plots.Plot]:
    """Those that there are results for."""
    drawn = []
    for device, group in _grouped(results, lambda result: result.device).items():
        contents = [result.content for result in group if result.is_of_models]
        if contents:
            drawn += [plots.speeds(device, contents), plots.ceilings(device, contents)]
        for result in group:
            if result.sizes and (plot := plots.kernel_times(f"{device}-{result.file.stem}", result.sizes)).figures:
                drawn.append(plot)
    return drawn


# --- files ----------------------------------------------------------------------------------------------------------


def sections(results: Sequence[Result]) -> Iterator[tuple[Path, str, str]]:
    """(file, marker, what stands there) of everything generated in a document."""
    yield Path("README.md"), "measured", measured(results)
    yield (
        Path("benchmarks/README.md"),
        "paper",
        paper.page([result.content for result in results if result.is_of_models]),
    )


def with_section(text: str, marker: str, body: str) -> str:
    """text with body between `<!-- marker -->` and `<!-- /marker -->`. Raises ValueError when it has no such place."""
    start, end = f"<!-- {marker}: written by python -m benchmarks.report -->", f"<!-- /{marker} -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"no place for the section {marker}: {start} ... {end}")
    return f"{before}{start}\n\n{body}\n\n{end}{after}"


def differences(root: Path) -> list[str]:
    """The files that disagree with the results below root."""
    results = load(root / RESULTS)
    stale = []
    for file, marker, body in sections(results):
        text = (root / file).read_text()
        if with_section(text, marker, body) != text:
            stale.append(f"{file}: the section {marker} is not what the results say")
    wanted = {plot.name: plot for plot in all_plots(results)}
    stale += [
        f"{PLOTS / name}.svg: missing or drawn from other figures"
        for name, plot in wanted.items()
        if not plot.is_drawn(root / PLOTS / f"{name}.svg")
    ]
    return stale + [f"{PLOTS / file.name}: no result belongs to it" for file in _stray_plots(root, wanted)]


def write(root: Path) -> list[Path]:
    """Bring the documents and plots below root in line with the results; returns the files that changed."""
    results = load(root / RESULTS)
    changed = []
    for file, marker, body in sections(results):
        text = (root / file).read_text()
        if (new := with_section(text, marker, body)) != text:
            (root / file).write_text(new)
            changed.append(file)
    (root / PLOTS).mkdir(parents=True, exist_ok=True)
    wanted = {plot.name: plot for plot in all_plots(results)}
    for name, plot in wanted.items():
        file = PLOTS / f"{name}.svg"
        if not plot.is_drawn(root / file):
            plot.save(root / file)
            changed.append(file)
    for file in _stray_plots(root, wanted):
        file.unlink()
        changed.append(PLOTS / file.name)
    return changed


def _stray_plots(root: Path, wanted: Mapping[str, plots.Plot]) -> list[Path]:
    return [file for file in sorted((root / PLOTS).glob("*.svg")) if file.stem not in wanted]


# --- the command ----------------------------------------------------------------------------------------------------


def main(
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit 1 where something is out of date")
    ] = False,
    on_paper: Annotated[bool, typer.Option("--paper", help="print the predictions and write nothing")] = False,
    root: Annotated[Path, typer.Option(help="the checkout")] = ROOT,
) -> None:
    """Write the tables and plots of the documentation from the results."""
    if on_paper:
        print(paper.page([result.content for result in load(root / RESULTS) if result.is_of_models]))
    elif not check:
        for file in write(root):
            typer.echo(f"wrote {os.fspath(file)}", err=True)
    elif stale := differences(root):
        for line in stale:
            typer.echo(line, err=True)
        typer.echo("run: python -m benchmarks.report", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
