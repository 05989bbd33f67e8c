"""Compile every kernel as it is launched, for GPUs that need not be present, and read the machine code's resources.

The calls of `shipped` run on CPU tensors. Triton is told that a GPU is present, and a hook records and skips each
launch. Figures come from the machine code that triton makes. A launch fails when it does not compile, spills registers,
needs more shared memory than the chip has, rounds float32 to tf32 unasked or not where asked, or multiplies
half-precision matrices on sm_90 without wgmma.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..common import chip
from .shipped import TF32, Call, calls

# Shared memory of one program, in KiB.
SHARED_LIMITS = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip
# The persistent kernels are compiled for the number of multiprocessors: an H100 or H200, and a B200.
_MULTIPROCESSORS = {"sm_90": 132, "sm_100": 148}
# The width in bytes of a store to local memory in the machine code.
_STORE_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

# Kernels of prefill and training that multiply matrices: in half precision they must use wgmma on sm_90, and tf32 where
# it is asked for.
_MATRIX_KERNELS = {
    "_causal_attention_fwd_kernel", "_causal_attention_bwd_dq_kernel", "_causal_attention_bwd_dkdv_kernel",
    "_gelu_mlp_fwd_hidden_kernel", "_gelu_mlp_fwd_out_kernel", "_gelu_mlp_bwd_pre_kernel",
}  # fmt: skip
_HALF = "bf16", "fp16"


class Launch(NamedTuple):
    """A kernel as it is launched, with triton's own record of the types and values for which it is compiled."""

    operation: str
    label: str
    module: str
    kernel: str
    specialization: str  # JSON, as triton writes and reads it


@dataclass(frozen=True)
class Finding:
    """One compiled launch: registers and spilled_bytes per thread, shared_bytes per program."""

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


# --- what is launched -----------------------------------------------------------------------------------------------


class _AbsentGpu:
    """What triton asks of a GPU's driver before it compiles. The chip's name stands for the device in its caches."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_device(self) -> str:
        return self.architecture

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        is_hip = self.architecture.startswith("gfx")
        return GPUTarget("hip", self.architecture, 64) if is_hip else GPUTarget("cuda", int(self.architecture[3:]), 32)


@contextmanager
def _absent_gpu(architecture: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_AbsentGpu(architecture))  # type: ignore[arg-type]
    try:
        with chip.assume(chip.Chip(architecture, _MULTIPROCESSORS.get(architecture, 100))):
            yield
    finally:
        driver._active = before


def record(calls: Iterable[Call], architecture: str) -> list[Launch]:
    """The distinct launches that calls make on one of `SHARED_LIMITS`, in order; nothing is compiled or run."""
    launches: dict[tuple[str, str], Launch] = {}
    call = None

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        assert call is not None
        label = f"{call.label}: {_describe(fn.jit_function, compile)}"
        launch = Launch(call.operation, label, fn.module, fn.name, compile["specialization_data"])
        launches.setdefault((fn.name, launch.specialization), launch)
        return True  # Tells triton to do nothing more.

    knobs.runtime.jit_cache_hook, before = note, knobs.runtime.jit_cache_hook
    try:
        with _absent_gpu(architecture):
            for call in calls:
                call.run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(launches.values())


def _describe(kernel: Any, compile: Any) -> str:
    """The compile-time arguments that are set, without lower-case ones, which triton specialises where they are 1."""
    values = {kernel.arg_names[path[0]]: value for path, value in compile["constants"].items()}
    shown = {name: value for name, value in values.items() if name.isupper() and value is not False}
    words = [name if value is True else f"{name}={value}" for name, value in shown.items()]
    return " ".join([*words, f"warps={compile['num_warps']}", f"stages={compile['num_stages']}"])


# --- one of them ----------------------------------------------------------------------------------------------------


def audit(launch: Launch, architecture: str) -> Finding:
    """Compile a recorded launch for a chip, and judge it."""
    finding = Finding(launch.operation, launch.kernel.strip("_"), launch.label, architecture)
    try:
        compiled = compile_launch(launch, architecture)
    except Exception as error:  # Whatever a compiler raises is a finding about the kernel.
        reason = (str(error).strip() or "no message").splitlines()[-1]
        return replace(finding, failure=f"{type(error).__name__}: {reason}")
    read = _read_hip if architecture.startswith("gfx") else _read_cuda
    finding = replace(finding, shared_bytes=compiled.metadata.shared, **read(compiled))
    return replace(finding, failure=_failure(launch, finding))


def compile_launch(launch: Launch, architecture: str) -> CompiledKernel:
    """The machine code of a launch."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    with _absent_gpu(architecture):
        return kernel.preload(launch.specialization)


def _failure(launch: Launch, finding: Finding) -> str | None:
    shared_limit = SHARED_LIMITS[finding.architecture]
    if finding.spilled_bytes:
        return f"{finding.spilled_bytes} bytes spilled"
    if finding.shared_bytes > shared_limit * 1024:
        return f"{finding.shared_bytes} bytes of shared memory exceed {shared_limit} KiB"
    multiplies = launch.kernel in _MATRIX_KERNELS
    asks_for_tf32 = multiplies and launch.label.startswith(TF32) and finding.architecture.startswith("sm_")
    if finding.tf32 and not asks_for_tf32:
        return f"{finding.tf32} tf32 instructions"
    if asks_for_tf32 and not finding.tf32:
        return "no tf32 instruction"
    if multiplies and launch.label.startswith(_HALF) and finding.architecture == "sm_90" and not finding.wgmma:
        return "no wgmma instruction"
    return None


def _read_cuda(compiled: CompiledKernel) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = {
            name: int(value) for name, value in re.findall(r"(\w+):(\d+)", _tool("cuobjdump", "-res-usage", cubin))
        }
        # Spilled registers lie in the stack frame; without one there is no need to disassemble.
        has_frame = usage["STACK"] or usage["LOCAL"]
        spilled = spilled_bytes(_tool("nvdisasm", "-c", cubin)) if has_frame else 0
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage["REG"],
        "spilled_bytes": spilled,
        "wgmma": ptx.count("wgmma.mma_async"),
        "tf32": len(re.findall(r"[.:]tf32\b", ptx)),
    }


def _tool(name: str, option: str, cubin: Path) -> str:
    path = Path(nvidia.__path__[0], "bin", name)
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def spilled_bytes(machine_code: str) -> int:
    """Bytes that NVIDIA machine code stores to local memory; without any store, each local load counts as one word."""
    stores = re.findall(r"\bSTL((?:\.\w+)*)", machine_code)
    widths = (next((_STORE_WIDTHS[s] for s in store.split(".") if s in _STORE_WIDTHS), 4) for store in stores)
    return sum(widths) if stores else 4 * len(re.findall(r"\bLDL\b", machine_code))


def _read_hip(compiled: CompiledKernel) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]
    registers, spilled = (re.findall(rf"\.{name}:\s*(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": int(registers[0]), "spilled_bytes": 4 * int(spilled[0])}


# --- all of them ----------------------------------------------------------------------------------------------------


def launches(architecture: str, only: str = "") -> list[Launch]:
    """All launches that ship for a chip and whose "operation label" contains `only`."""
    recorded = record(calls(architecture), architecture)
    return [launch for launch in recorded if only in f"{launch.operation} {launch.label}"]


def audit_all(architectures: Sequence[str], only: str = "", n_jobs: int = 1, once: bool = False) -> list[Finding]:
    """The findings of every launch, in a fixed order.

    architectures: of `SHARED_LIMITS`. only: as `launches` takes it. n_jobs: worker processes, 1 for none. once: whether
    the first launch of each kernel is enough.
    """
    found = {architecture: launches(architecture, only) for architecture in architectures}
    if once:
        found = {architecture: _of_each_kernel(shipped) for architecture, shipped in found.items()}
    tasks = [(launch, architecture) for architecture, shipped in found.items() for launch in shipped]
    if n_jobs == 1:
        return [audit(*task) for task in tasks]
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(audit, *zip(*tasks, strict=True), chunksize=8)) if tasks else []


def _of_each_kernel(found: Sequence[Launch]) -> list[Launch]:
    """The first launch of each kernel."""
    firsts: dict[str, Launch] = {}
    for launch in found:
        firsts.setdefault(launch.kernel, launch)
    return list(firsts.values())
