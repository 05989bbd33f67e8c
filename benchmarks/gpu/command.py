"""Everything that only a GPU can prove, in one command: parity of the kernels, then speed and memory against others.

    PYTHONPATH=.:kernels python -m benchmarks gpu --minutes 8 --out DIR

It needs a checkout and no installation. What matters most comes first, and DIR/result.json is written after every part
of a step: a run that is cut off leaves what it had, and the same command goes on from there. What hangs, exits or
breaks the GPU costs its own part alone. `--dry-run` takes every step on tiny shapes, on a CPU with the kernels in the
interpreter: it proves the command, and its times say nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from fastgpt.bench import machine

from ..report import records
from . import kernels as gpu_kernels
from . import models as gpu_models
from . import smoke
from . import tables as gpu_tables
from .run import ROOT, Extent, Part, Run, Step, checked_sizes, dry, full
from .supervise import OutOfTime, Supervisor

SCHEMA = 3
_log = Console(stderr=True, highlight=False)


def environment(run: Run) -> Iterator[Part]:
    """The machine, versions and the commit."""
    yield Part("machine", partial(machine.describe, run.extent.device))
    yield Part("versions", machine.versions)
    yield Part("commit", _commit)


def _commit() -> str | None:
    named = os.environ.get("FASTGPT_COMMIT")
    if named or shutil.which("git") is None:
        return named or None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def groups(extent: Extent) -> Iterator[dict[str, Step]]:
    """All steps by name, the most important first. The steps of a group run at the same time.

    So do the smoke tests; a step that times something is alone in its group. Curves are drawn for the first size only.
    """
    yield {"environment": environment}
    name = str(extent.dtype).removeprefix("torch.")
    yield smoke.steps({name: extent.dtype, "float32": torch.float32})
    yield {"rates": gpu_kernels.rates}
    yield {"waits": gpu_kernels.wait_times}
    first, *_ = extent.shapes
    for size in extent.shapes:
        yield {f"decode {size}": partial(gpu_models.decode, size=size)}
        yield {f"prefill {size}": partial(gpu_models.prefill, size=size)}
        yield {f"train {size}": partial(gpu_models.train, size=size)}
        yield {f"kernels {size}": partial(gpu_kernels.kernels, size=size)}
        yield {f"steps {size}": partial(gpu_kernels.steps, size=size)}
        yield {f"profile {size}": partial(gpu_models.profiles, size=size)}
        if size == first:
            yield {"tests": gpu_kernels.tests}
            yield {"ceilings": gpu_kernels.ceilings}
            yield {f"decode batches {size}": partial(gpu_models.decode_batches, size=size)}
            yield {f"memory {size}": partial(gpu_models.memory, size=size)}
            yield {f"latency {size}": partial(gpu_models.latency, size=size)}
        yield {f"compiled {size}": partial(gpu_models.compiled, size=size)}
        yield {f"cold start {size}": partial(gpu_models.cold_starts, size=size)}


def main(
    out: Annotated[Path, typer.Option(help="folder for result.json; an unfinished run is continued")],
    minutes: Annotated[float, typer.Option(help="start nothing further after this long")] = 8.0,
    sizes: Annotated[
        str, typer.Option(help="presets, in the order of their importance")
    ] = "gpt2,gpt2-xl,gpt2-medium,gpt2-large",
    batch: Annotated[int, typer.Option(help="sequences of 1024 tokens")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="every step on tiny shapes, on a CPU")] = False,
) -> None:
    """Prove the kernels on the GPU at hand."""
    stop_at = time.monotonic() + 60 * minutes
    names = checked_sizes(sizes, dry_run)
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # which triton reads when it is imported, in the processes that measure
        sys.path.append(str(ROOT / "tests"))  # for them too
    out.mkdir(parents=True, exist_ok=True)
    n_processes = min(16, os.cpu_count() or 1) if find_spec("xdist") else 1
    extent = dry() if dry_run else full(names, batch, n_processes)
    transformers.logging.disable_progress_bar()
    result = _result(out / "result.json", dry_run, extent)
    supervisor = Supervisor(extent, stop_at, out / "result.json", result, _say)

    try:
        for steps in groups(extent):
            supervisor.take({name: step for name, step in steps.items() if name not in result["seconds"]})
    except OutOfTime:
        _say("no time left: the same command goes on from here")
    finally:
        supervisor.close()
    gpu_tables.render(result, Console(width=120))
    if "tests" not in result["seconds"] or records.faults(result):
        raise typer.Exit(1)


def _say(what: str) -> None:
    _log.print(what, markup=False)


def _result(file: Path, dry_run: bool, extent: Extent) -> dict[str, Any]:
    """The result of an unfinished run, or an empty one."""
    kind = {"schema": SCHEMA, "dry_run": dry_run, "batch": extent.n_batch}
    if not file.is_file():
        return kind | {"seconds": {}}
    result = json.loads(file.read_text())
    if {name: result.get(name) for name in kind} != kind:
        raise typer.BadParameter(f"{file} is the result of another kind of run: give another folder")
    if "environment" in result["seconds"]:
        was, gpu = result["environment"], machine.describe(extent.device)["gpu"]
        if (was["machine"]["gpu"], was["versions"], was["commit"]) != (gpu, machine.versions(), _commit()):
            raise typer.BadParameter(f"{file} is of another GPU, commit or version: give another folder")
    return result
