"""The tables and plots of the documentation, written from `benchmarks/results` alone.

python -m benchmarks report            # rewrite the tables between their markers, and the plots
python -m benchmarks report --check    # exit 1 where they and the results disagree
python -m benchmarks report --paper    # print what the formulas predict
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import paper, plots, scale
from .records import Result, benchmarks, curve, load, operations
from .tables import RESULTS, detail_tables, headline, speed_tables

ROOT = Path(__file__).parents[2]
PLOTS = RESULTS / "plots"

# --- plots ----------------------------------------------------------------------------------------------------------


def all_plots(results: Sequence[Result]) -> list[plots.Plot]:
    """The plots for which there are results."""
    drawn = []
    for device in dict.fromkeys(result.device for result in results):
        group = [result for result in results if result.device == device]
        contents = [content for result in group for content in benchmarks(result.content).values()]
        if contents:
            drawn += [plots.speeds(device, contents), plots.ceilings(device, contents)]
        for result in group:
            content = result.content
            drawn += [
                plots.kernel_times(result.name, operations(content)),
                plots.memory(result.name, curve(content, "memory")),
                plots.latency(result.name, curve(content, "latency")),
            ]
    return [plot for plot in drawn if plot.figures]


# --- files ----------------------------------------------------------------------------------------------------------


def sections(results: Sequence[Result]) -> Iterator[tuple[Path, str, str]]:
    """Everything generated in a document: (file, marker, text between the markers)."""
    images = [f"![{plot.caption}](../{(PLOTS / plot.name).as_posix()}.svg)" for plot in all_plots(results)]
    yield Path("README.md"), "speeds", headline(results)
    yield Path("docs/results.md"), "measured", "\n\n".join([*speed_tables(results), *images])
    yield Path("benchmarks/README.md"), "details", "\n\n".join(detail_tables(results)) or "Nothing yet."
    yield Path("benchmarks/README.md"), "paper", _paper(results)
    yield Path("docs/scale.md"), "scale", scale.page()


def _paper(results: Sequence[Result]) -> str:
    return paper.page([content for result in results for content in benchmarks(result.content).values()])


def with_section(text: str, marker: str, body: str) -> str:
    """Replace what stands between the two markers in text. Raises ValueError when a marker is missing."""
    start, end = f"<!-- {marker}: written by python -m benchmarks report -->", f"<!-- /{marker} -->"
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
        print(_paper(load(root / RESULTS)), scale.page(), sep="\n\n")
    elif not check:
        for file in write(root):
            typer.echo(f"wrote {os.fspath(file)}", err=True)
    elif stale := differences(root):
        for line in stale:
            typer.echo(line, err=True)
        typer.echo("run: python -m benchmarks report", err=True)
        raise typer.Exit(1)
