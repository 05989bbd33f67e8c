"""Compile every shipped kernel configuration for GPUs that need not be there, and read what the machine code takes.

    python -m fastgpt_kernels.audit [--arch 90,gfx942] [--only TEXT] [--jobs 2] [--json FILE]

Figures come from the machine code that triton itself made. A configuration fails when it does not compile, spills a
register, needs more shared memory than the chip has, rounds float32 to tf32, or multiplies half-precision matrices on
sm_90 without wgmma. Exit code 0 when all pass, 1 when one fails, 2 on wrong usage.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import DECODING_MODULES, KERNEL_MODULES
from .fused.launch import FP_FUSION, Configuration

# Modules with a function shipped_configurations(architecture), which yields what is compiled for one GPU.
AUDITED_MODULES = (*dict.fromkeys(KERNEL_MODULES.values()), *DECODING_MODULES)

# Shared memory of one program, in KiB.
SHARED_LIMITS = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip
# The width of a local store in the machine code, in bytes.
_STORE_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Finding:
    """One compiled configuration: bytes and registers are those of a thread, shared_bytes those of a program."""

    operation: str
    kernel: str
    configuration: str
    architecture: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    wgmma: int = 0
    tf32: int = 0
    failure: str | None = None


# --- one configuration ----------------------------------------------------------------------------------------------


def audit(configuration: Configuration, architecture: str) -> Finding:
    """Compile one configuration for one of `SHARED_LIMITS` and judge it."""
    finding = Finding(
        configuration.operation, configuration.kernel.__name__.strip("_"), configuration.label, architecture
    )
    try:
        compiled = _compile(configuration, architecture)
    except Exception as error:  # Whatever a compiler raises is a finding about the kernel.
        reason = (str(error).strip() or "no message").splitlines()[-1]
        return replace(finding, failure=f"{type(error).__name__}: {reason}")
    read = _read_hip if architecture.startswith("gfx") else _read_cuda
    finding = replace(finding, shared_bytes=compiled.metadata.shared, **read(compiled))
    return replace(finding, failure=_failure(configuration, finding))


def _compile(configuration: Configuration, architecture: str) -> CompiledKernel:
    kernel = configuration.kernel
    signature = {name: _type(configuration, name) for name in kernel.arg_names}
    divisible = [
        name
        for name in kernel.arg_names
        if signature[name].startswith("*") or (name in configuration.divisible and signature[name] != "constexpr")
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(configuration.constants), attrs=attributes)
    is_hip = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if is_hip else GPUTarget("cuda", int(architecture[3:]), 32)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    options |= FP_FUSION
    return triton.compile(source, target=target, options=options)


def _type(configuration: Configuration, name: str) -> str:
    if name in configuration.constants:
        return "constexpr"
    return configuration.types.get(name, f"*{configuration.dtype}" if name.endswith("_ptr") else "i32")


def _failure(configuration: Configuration, finding: Finding) -> str | None:
    shared_limit = SHARED_LIMITS[finding.architecture]
    if finding.spilled_bytes:
        return f"{finding.spilled_bytes} bytes spilled"
    if finding.shared_bytes > shared_limit * 1024:
        return f"{finding.shared_bytes} bytes of shared memory exceed {shared_limit} KiB"
    if finding.tf32:
        return f"{finding.tf32} tf32 instructions"
    if configuration.tensor_cores and finding.architecture == "sm_90" and not finding.wgmma:
        return "no wgmma instruction"
    return None


def _read_cuda(compiled: CompiledKernel) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = {
            name: int(value) for name, value in re.findall(r"(\w+):(\d+)", _tool("cuobjdump", "-res-usage", cubin))
        }
        # Spilled registers lie in the stack frame; where there is none, disassembling can be spared.
        has_frame = usage["STACK"] or usage["LOCAL"]
        spilled = spilled_bytes(_tool("nvdisasm", "-c", cubin)) if has_frame else 0
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage["REG"],
        "spilled_bytes": spilled,
        "wgmma": ptx.count("wgmma.mma_async"),
        "tf32": ptx.count(".tf32"),
    }


def _tool(name: str, option: str, cubin: Path) -> str:
    path = Path(nvidia.__path__[0], "bin", name)
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def spilled_bytes(machine_code: str) -> int:
    """What the local stores in NVIDIA machine code write; loads without a store count as one word each."""
    stores = re.findall(r"\bSTL((?:\.\w+)*)", machine_code)
    widths = (next((_STORE_WIDTHS[s] for s in store.split(".") if s in _STORE_WIDTHS), 4) for store in stores)
    return sum(widths) if stores else 4 * len(re.findall(r"\bLDL\b", machine_code))


def _read_hip(compiled: CompiledKernel) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]
    registers, spilled = (re.findall(rf"\.{name}:\s*(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": int(registers[0]), "spilled_bytes": 4 * int(spilled[0])}


# --- all of them ----------------------------------------------------------------------------------------------------


def configurations(architecture: str) -> Iterator[Configuration]:
    """Everything that ships for one GPU."""
    for module in AUDITED_MODULES:
        yield from importlib.import_module(f".{module}", __package__).shipped_configurations(architecture)


def _audit_nth(architecture: str, index: int) -> Finding:
    """For worker processes, to which kernels cannot be sent."""
    return audit(list(configurations(architecture))[index], architecture)


def audit_all(architectures: Sequence[str], only: str = "", n_jobs: int = 1) -> list[Finding]:
    """The findings of every shipped configuration, in a fixed order.

    architectures: of `SHARED_LIMITS`. only: text that the operation and the label of a configuration, separated by a
    space, must contain. n_jobs: worker processes, 1 for none.
    """
    tasks = [
        (architecture, index)
        for architecture in architectures
        for index, configuration in enumerate(configurations(architecture))
        if only in f"{configuration.operation} {configuration.label}"
    ]
    if n_jobs == 1:
        return [_audit_nth(*task) for task in tasks]
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_audit_nth, *zip(*tasks, strict=True), chunksize=8)) if tasks else []


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
        prog="python -m fastgpt_kernels.audit", description="What every shipped kernel configuration takes."
    )
    parser.add_argument("--arch", type=_architectures, default=list(SHARED_LIMITS), help="comma-separated; all of them")
    parser.add_argument("--only", default="", metavar="TEXT", help='such as "layer_norm bf16"')
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there as well")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, under which nothing can be compiled: unset it")
    findings = audit_all(options.arch, options.only, options.jobs)
    if not findings:
        parser.error(f"no shipped configuration holds {options.only!r}")
    if options.json:
        options.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    n_failed = sum(finding.failure is not None for finding in findings)
    print(table(findings))
    print(f"{len(findings)} configurations with triton {triton.__version__}, {n_failed} failed", file=sys.stderr)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
