"""A model of time: how long a launch would take on an H100 or H200, from what it executes. Predicted, not measured.

Every unit of a GPU works at its own rate, and the slowest is the limit, as if all others hid behind it. The busiest
multiprocessor has ceil(programs / multiprocessors) programs and the time of all is its time. Where few warps are
resident, the limit is a warp's own chain of instructions, barriers and loads; programs then come in waves, as many at a
time as registers and shared memory let be resident.

Memory is asked for what is due: sectors that several programs read again are served by L2. Instructions are those of
the machine code that the counted PTX becomes (`machine_code.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# The CUDA C++ Programming Guide: "Throughput of Native Arithmetic Instructions", compute capability 9.0, results of a
# multiprocessor and cycle, here divided by the 32 lanes of a warp: float32 and integers, of which products have the
# half of the float pipes that `machine_code` calls heavy.
_WARPS_PER_CYCLE = {
    "FMA": 128 / 32, "FMA heavy": 64 / 32, "ALU": 64 / 32, "special": 16 / 32, "exchange": 32 / 32, "float64": 64 / 32,
}  # fmt: skip
# FLOPs of a multiprocessor and cycle. NVIDIA's H100 whitepaper: 989.4 TFLOP/s dense on 132 multiprocessors at 1.83 GHz
# in half precision, half as many in tf32, 66.9 in float64.
_TENSOR_FLOPS = {"bf16": 4096, "f16": 4096, "tf32": 2048, "f64": 256}
# The Hopper Tuning Guide: four schedulers, each of which issues an instruction per cycle; 32 banks of 4 bytes serve a
# pass per cycle; warps, programs, registers and shared memory (1 KiB a program is the system's).
_ISSUED_PER_CYCLE, _PASSES_PER_CYCLE = 4, 1
_MAX_WARPS, _MAX_PROGRAMS, _REGISTERS, _SHARED_BYTES, _SHARED_OF_SYSTEM = 64, 32, 65536, 228 * 1024, 1024
_REGISTERS_UNIT = 256  # of a warp: NVIDIA's occupancy calculator
# Luo et al., arXiv 2402.13499, measured on an H100: cycles to memory.
_MEMORY_CYCLES = 479
# Estimated: a dependent instruction starts 4 cycles after the one it waits for (Jia et al., arXiv 1804.06826, on
# Volta), and half of all wait for the one before them; a barrier of a program.
_CYCLES_OF_AN_INSTRUCTION, _CYCLES_OF_A_BARRIER = 2, 30


@dataclass(frozen=True)
class Gpu:
    """clock_hz: at which the whitepaper's matrix rate holds. bandwidth, l2_bandwidth: bytes/s."""

    name: str
    bandwidth: float
    n_multiprocessors: int = 132
    clock_hz: float = 1.83e9
    # 5120 bytes a cycle: the A100 whitepaper, and for an H100 8986 GB/s at 1.755 GHz in table 3 of PMC10448217. On the
    # smaller H100 PCIe about two thirds of it were measured (chipsandcheese.com, July 2023).
    l2_bandwidth: float = 5120 * 1.83e9
    # Estimated, as in benchmarks/report/paper.py: one kernel of a CUDA graph drains, the next fills the GPU.
    launch_s: float = 3e-6


# Data sheets: 3.35 and 4.8 TB/s. A large copy reaches 90% of it on an H200 (fastgpt.accounting); so assumed for both.
H100 = Gpu("H100 SXM", 0.9 * 3.35e12)
H200 = Gpu("H200 SXM", 0.9 * 4.8e12)


@dataclass(frozen=True)
class Program:
    """What one program occupies. registers: of a thread."""

    n_warps: int
    registers: int
    shared_bytes: int

    @property
    def n_resident(self) -> int:
        """How many programs a multiprocessor holds at once."""
        of_a_warp = -(-32 * self.registers // _REGISTERS_UNIT) * _REGISTERS_UNIT
        by_registers = _REGISTERS // (self.n_warps * of_a_warp)
        by_shared = _SHARED_BYTES // (self.shared_bytes + _SHARED_OF_SYSTEM)
        return max(1, min(_MAX_WARPS // self.n_warps, _MAX_PROGRAMS, by_registers, by_shared))


def limits(counts: Mapping[str, float], program: Program, due_bytes: float, gpu: Gpu) -> dict[str, float]:
    """Seconds that each unit takes alone, the longest first.

    counts: of all programs of a launch, as `counts.counted` and `machine_code.executed` name them. due_bytes: of the
    launch.
    """
    n_programs = counts["programs"]
    n_busiest = math.ceil(n_programs / gpu.n_multiprocessors)
    n_waves = math.ceil(n_programs / (gpu.n_multiprocessors * program.n_resident))

    def of_busiest(cycles: float) -> float:
        return cycles / n_programs * n_busiest / gpu.clock_hz

    by_unit = {unit: counts.get(f"{unit} machine instructions", 0) for unit in _WARPS_PER_CYCLE}
    by_unit["FMA"] += by_unit["FMA heavy"]
    issued = counts["machine instructions"]
    products = sum(counts.get(f"{dtype} FLOPs", 0) / rate for dtype, rate in _TENSOR_FLOPS.items())
    chain = issued / n_programs / program.n_warps * _CYCLES_OF_AN_INSTRUCTION
    chain += counts.get("barriers", 0) / n_programs * _CYCLES_OF_A_BARRIER + 2 * _MEMORY_CYCLES  # the first, the last
    seconds = {
        "memory": due_bytes / gpu.bandwidth,
        "L2": 32 * (counts.get("load sectors", 0) + counts.get("store sectors", 0)) / gpu.l2_bandwidth,
        "tensor cores": of_busiest(products),
        "issue": of_busiest(issued / _ISSUED_PER_CYCLE),
        "shared memory": of_busiest(counts.get("shared passes", 0) / _PASSES_PER_CYCLE),
        "latency": n_waves * chain / gpu.clock_hz,
    }
    seconds |= {unit: of_busiest(by_unit[unit] / rate) for unit, rate in _WARPS_PER_CYCLE.items()}
    return {unit: float(s) for unit, s in sorted(seconds.items(), key=lambda item: -item[1])}


def seconds(found: Mapping[str, float], gpu: Gpu) -> float:
    """The time of a launch with these limits."""
    return max(found.values()) + gpu.launch_s
