"""python -m fastgpt_kernels.audit [--arch 90,gfx942] [--only TEXT] [--once] [--jobs 2] [--json FILE]

Exit code 0 when every launch passes, 1 when one fails, 2 on wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import triton
from triton import knobs

from . import SHARED_LIMITS, Finding, audit_all


def table(findings: Sequence[Finding]) -> str:
    """The findings as text, one a line, under a heading."""
    heading = ("operation", "kernel", "configuration", "arch", "registers", "spilled", "shared", "wgmma", "tf32", "")
    rows = [
        (
            *map(str, list(asdict(finding).values())[:-1]),
            "" if finding.failure is None else f"FAILED: {finding.failure}",
        )
        for finding in findings
    ]
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heading, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _architectures(text: str) -> list[str]:
    names = [name if name.startswith(("sm_", "gfx")) else f"sm_{name}" for name in text.split(",")]
    if unknown := [name for name in names if name not in SHARED_LIMITS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose from {', '.join(SHARED_LIMITS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt_kernels.audit", description="What every kernel that ships takes."
    )
    parser.add_argument("--arch", type=_architectures, default=list(SHARED_LIMITS), help="comma-separated; all of them")
    parser.add_argument("--only", default="", metavar="TEXT", help='such as "layer_norm bf16"')
    parser.add_argument("--once", action="store_true", help="the first launch of each kernel alone")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there as well")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, under which nothing can be compiled: unset it")
    findings = audit_all(options.arch, options.only, options.jobs, options.once)
    if not findings:
        parser.error(f"no launch that ships holds {options.only!r}")
    if options.json:
        options.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    n_failed = sum(finding.failure is not None for finding in findings)
    print(table(findings))
    print(f"{len(findings)} launches with triton {triton.__version__}, {n_failed} failed", file=sys.stderr)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
