"""The machine that a benchmark runs on: its description and versions, its clock, its best rates, and its memory."""

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PACKAGES = ("fastgpt", "torch", "triton", "transformers", "safetensors", "peft", "accelerate")


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, GPU, threads: ready for JSON; None for what is absent."""
    is_cuda = device.type == "cuda"
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str | None]:
    """Installed versions by package, None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"torch": torch.__version__}  # which also names the build, for a CPU or a version of CUDA


def cpu_name() -> str:
    """The processor, as Linux calls it; Python alone knows no name there."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Average number of processes that wanted a core in the last minute; None where the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# --- time -----------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, including the work that it starts on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has no work outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# More than the second-level cache of any GPU.
_CLEARED_BYTES = 2**28
# How much longer a GPU clears memory than the host takes to launch a call.
_AHEAD = 1.5


def gpu_seconds(call: Callable[[], Any], device: torch.device, budget_s: float) -> tuple[list[float], float]:
    """How long a GPU takes for each of several runs of a call, in about budget_s, and how long the host, to launch one.

    Nothing of a run is in the second-level cache. A GPU that has to wait for launches would be timed waiting: before
    each run it clears memory for longer than the host takes to launch the run, so that the host is ahead of it, as it
    is in a model whose GPU is busy.
    """
    memory = torch.empty(_CLEARED_BYTES // 4, dtype=torch.int32, device=device)

    def timed(run: Callable[[], Any], n_runs: int, n_clears: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n_runs)]
        for start, end in events:
            for _ in range(n_clears):
                memory.zero_()
            start.record()
            run()
            end.record()
        synchronize(device)
        return [start.elapsed_time(end) / 1000 for start, end in events]

    with torch.cuda.device(device):  # which records the events
        launch_s = median(_launch_seconds(call, device) for _ in range(5))
        clear_s = median(timed(memory.zero_, 5, 1))
        n_clears = 1 + int(_AHEAD * launch_s / clear_s)
        run_s = n_clears * clear_s + median(timed(call, 3, n_clears))
        n_runs = max(5, int(budget_s / run_s))
        timed(call, n_runs // 4, n_clears)  # for the GPU's clocks
        return timed(call, n_runs, n_clears), launch_s


def _launch_seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- rates ----------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The rates that the machine reaches now: {"bandwidth" in bytes/s, "matrix_rate" in FLOP/s}.

    bandwidth: the faster of a large copy (read and written) and a large sum (read). matrix_rate: a large product in
    dtype, or in float32 where the machine multiplies that faster.
    """
    n_bytes, size = (2**32, 8192) if device.type == "cuda" else (2**28, 2048)
    dtypes = [dtype] if dtype == torch.float32 else [dtype, torch.float32]
    return {
        "bandwidth": _bandwidth(n_bytes, device),
        "matrix_rate": max(_matrix_rate(size, device, product_dtype) for product_dtype in dtypes),
    }


def _bandwidth(n_bytes: int, device: torch.device) -> float:
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied_s = _best_seconds(lambda: target.copy_(source), device)
    return max(2 * n_bytes / copied_s, n_bytes / _best_seconds(source.sum, device))


def _matrix_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best_seconds(lambda: a @ a, device)


def _best_seconds(call: Callable[[], Any], device: torch.device, n: int = 5) -> float:
    call()
    return min(seconds(call, device) for _ in range(n))


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_growth(call: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """The most bytes of torch's allocations that a call needs on top of those held before it, and how they are counted.

    On a CPU torch's profiler counts them. It notices that memory is freed only if it saw it allocated, so it traces two
    calls, and the second counts. What libraries allocate by themselves is not counted.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch allocations"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # Else it says on standard error when it starts and stops.
    # Without acc_events torch 2.12 warns.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
        with record_function(_SECOND_CALL):
            call()
    with TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())["traceEvents"]
    start = next(event["ts"] for event in events if event["name"] == _SECOND_CALL)
    totals = sorted((event["ts"], event["args"]["Total Allocated"]) for event in events if event["name"] == "[memory]")
    held = [total for time, total in totals if time < start][-1:] or [0]
    return max(held + [total for time, total in totals if time >= start]) - held[0], "torch allocations"


_SECOND_CALL = "second call"


def resident_growth(call: Callable[[], Any]) -> tuple[int | None, str]:
    """`peak_growth` for an engine that does not allocate through torch: the growth of the process' resident set.

    It counts whole pages, and memory that was freed but that the allocator keeps. Without Linux (None, "n/a").
    """
    gc.collect()
    before = _start_peak_of_resident_set()
    if before is None:
        return None, "n/a"
    call()
    return max(0, _resident_bytes("VmHWM") - before), "resident set growth"


def _start_peak_of_resident_set() -> int | None:
    """Return freed memory to the system and reset the peak. Returns the resident bytes, None if that fails."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _resident_bytes("VmRSS")


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
