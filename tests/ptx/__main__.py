"""Runs what ships from its PTX, warps one by one in random order, and prints what was noticed as JSON.

    PYTHONPATH=tests:kernels python -m ptx [--arch sm_90] [--only "layer_norm bf16*" ...] [--seed 0] [--once]
    PYTHONPATH=tests:kernels python -m ptx --counts [--json FILE] ...

With --counts, what every launch executes beside what is due, in lock-step and without checks. Without TRITON_INTERPRET.
It shares triton's cache with `python -m fastgpt_kernels.audit`: what one has compiled, the other finds there.
Exit code 0 when nothing was noticed, 1 when something was.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from fastgpt_kernels.audit import shipped

from . import counts
from .launch import COUNTING, Session, executing

# No tile depends on it, and no more divides it than divides GPT-2's, with which the head alone would take minutes.
_VOCABULARY = 1041
# Few, so that resident programs walk over several tiles. The vocabulary has enough tiles for more.
_MULTIPROCESSORS = {"decode": 16}
_SAMPLE = 32


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx", description="What ships, from its PTX on this CPU.")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--only", nargs="+", default=["*"], help='by operation and label, such as "layer_norm bf16*"')
    parser.add_argument("--once", action="store_true", help=f"check each machine code once, in {_SAMPLE} programs")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which warps run")
    parser.add_argument("--counts", action="store_true", help="count instructions, bytes, passes, products and waits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well")
    options = parser.parse_args()
    shipped._VOCABULARY = _VOCABULARY
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.counts:
        return _count(options.arch, options.only, options.json)
    return _check(options.arch, options.only, options.seed, options.once)


def _check(architecture: str, only: list[str], seed: int, once: bool) -> int:
    kernels, problems, n_launches = set(), [], 0
    how: dict[str, Any] = {"checked": set(), "sample": _SAMPLE} if once else {}
    for call, session in _executed(architecture, only, warps=True, seed=seed, **how):
        n_launches += len(session.launches)
        kernels |= {launch.kernel for launch in session.launches}
        for (kernel, kind, instruction), (times, example) in session.problems().items():
            problems.append(f"{call}: {kernel}: {kind} ({times} times; {example}): {instruction}")
    print(json.dumps({"launches": n_launches, "kernels": sorted(kernels), "problems": problems}))
    return 1 if problems or not n_launches else 0


def _count(architecture: str, only: list[str], file: Path | None) -> int:
    rows = []
    for call, session in _executed(architecture, only, **COUNTING):
        found = [counts.row(launch) for launch in session.launches]
        print(f"{call}\n{counts.lines(found)}", flush=True)
        rows += [{"call": call} | row for row in found]
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if rows else 1


def _executed(architecture: str, only: list[str], **options: Any) -> Iterator[tuple[str, Session]]:
    for call in shipped.calls(architecture):
        name = f"{call.operation} {call.label}"
        if any(fnmatchcase(name, pattern) for pattern in only):
            n_multiprocessors = _MULTIPROCESSORS.get(call.operation, 3)
            with executing(architecture, n_multiprocessors, machine_code=True, **options) as session:
                call.run()
            print(f"{time.process_time():.1f} s of the processor: {name}", file=sys.stderr, flush=True)
            yield name, session


if __name__ == "__main__":
    sys.exit(main())
