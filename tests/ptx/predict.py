"""Predicted times of the four workloads, as data and as a table: `python -m ptx.predict FILE`.

Predicted, not measured: see `model.py` and `workloads.py`.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from . import model, workloads
from .counts import KINDS, counted
from .due import due
from .launch import COUNTING, Launch, Session, executing
from .machine_code import executed

GPUS = model.H100, model.H200


def _executed(part: workloads.Part, sizes: dict[str, int]) -> Session:
    with executing("sm_90", part.multiprocessors, None, None, False, **COUNTING) as session:
        part.run(**sizes)
    return session


def _numbered(session: Session, part: workloads.Part) -> dict[str, Launch]:
    """Launches by the kernel's name, with a number from the second on."""
    found: dict[str, Launch] = {}
    for launch in session.launches:
        n_before = sum(known.kernel == launch.kernel for known in found.values())
        if re.search(part.kernels, launch.kernel):
            found[launch.kernel + (f" #{n_before + 1}" if n_before else "")] = launch
    return found


def _counted(launch: Launch) -> tuple[int, Counter]:
    """Registers of a thread, and counts of the PTX and of the machine code."""
    registers, of_machine_code = executed(launch.text, launch.report.blocks, "sm_90")
    return registers, counted(launch) + of_machine_code


def kernels(part: workloads.Part) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a part: counts at the wanted size, what is due, limits in seconds on each GPU."""
    sessions = [_executed(part, sizes) for sizes in part.tried]
    launches = [_numbered(session, part) for session in sessions]
    terms, wanted = [part.terms(**sizes) for sizes in part.tried], part.terms(**part.wanted)
    for name, launch in launches[0].items():
        registers, counts_of_each = zip(*(_counted(each[name]) for each in launches), strict=True)
        counts = workloads.scaled(counts_of_each, terms, wanted)
        arguments = launch.constants | {k: v for part_of_name, more in part.due.items() if part_of_name in name
                                        for k, v in more.items()}  # fmt: skip
        counts["programs"] = arguments.pop("n_programs", round(counts["programs"]))
        needed = due(launch.kernel, arguments, counts["programs"], launch.element_size)
        program = model.Program(launch.n_warps, registers[0], launch.shared)
        n_ptx = sum(n for key, n in counts.items() if key.removesuffix(" instructions") in KINDS)
        found = {gpu.name: model.limits(counts, program, needed.n_bytes, gpu) for gpu in GPUS}
        yield {
            "workload": part.workload, "kernel": name, "times": part.times, "registers": registers[0],
            "resident": program.n_resident,
            "machine_instructions_for_one_of_ptx": round(counts["machine instructions"] / n_ptx, 3),
            "due": needed._asdict(), "counts": {key: round(n) for key, n in counts.items()}, "limits_s": found,
            "predicted_s": {gpu.name: model.seconds(found[gpu.name], gpu) for gpu in GPUS},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ptx.predict", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for part in workloads.parts():
        started = time.perf_counter()
        rows += kernels(part)
        print(
            f"{time.perf_counter() - started:.0f} s: {part.workload}, {rows[-1]['kernel']}", file=sys.stderr, flush=True
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    content = {"predicted": True, "date": options.date, "commit": commit, "triton": triton.__version__, "kernels": rows}
    options.file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
