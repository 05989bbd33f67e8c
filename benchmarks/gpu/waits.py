"""The cost of waiting: a grid barrier of the persistent kernel, and a kernel that does nothing in a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from fastgpt_kernels.common.launch import launch
from fastgpt_kernels.operations.persistent_decode import tiles as persistent_decode_tiles
from fastgpt_kernels.operations.persistent_decode.kernels import _grid_barrier
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgpt.bench import operations


@triton.jit
def _barriers_kernel(counter_ptr, passed_ptr, n_barriers, N_PROGRAMS: tl.constexpr):
    """Every program passes n_barriers with nothing in between, and stores how many it passed."""
    target = tl.load(counter_ptr, volatile=True) // N_PROGRAMS * N_PROGRAMS
    for _ in range(n_barriers):
        target += N_PROGRAMS
        _grid_barrier(counter_ptr, target)
    tl.store(passed_ptr + tl.program_id(0), n_barriers)


@triton.jit
def _node_kernel(counter_ptr, OVERLAP: tl.constexpr):
    """Add one, in one program: the least work that shows that it ran."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(counter_ptr, tl.load(counter_ptr) + 1)


def pass_barriers(counter: Tensor, n_programs: int, n_barriers: int) -> Tensor:
    """How many barriers each program passed, (n_programs,). counter: (1,) int64, zero before the first call."""
    passed = torch.zeros(n_programs, dtype=torch.int64, device=counter.device)
    options = {"launch_cooperative_grid": True} if counter.is_cuda else {}
    launch(_barriers_kernel, n_programs, counter, passed, n_barriers=n_barriers, N_PROGRAMS=n_programs, **options)
    return passed


def barrier_seconds(device: torch.device, n_barriers: int, budget_s: float) -> dict[str, Any]:
    """Seconds of one barrier of all multiprocessors. Raises RuntimeError when a program did not pass all of them."""
    n_programs = persistent_decode_tiles.persistent_programs(device) if device.type == "cuda" else 1
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    passed = pass_barriers(counter, n_programs, n_barriers)
    if not bool((passed == n_barriers).all()) or int(counter) != n_programs * n_barriers:
        raise RuntimeError("a program has not passed all barriers")
    few, many = (
        operations.time_call(lambda n=n: pass_barriers(counter, n_programs, n), device, budget_s)["median_s"]
        for n in (1, 1 + n_barriers)
    )
    return {"programs": n_programs, "barriers": n_barriers, "median_s": (many - few) / n_barriers}


def node_seconds(device: torch.device, overlap: bool, n_nodes: int, budget_s: float) -> dict[str, Any]:
    """Seconds per kernel that does nothing, for n_nodes in a CUDA graph; on a CPU, for as many launches.

    overlap: each starts before the previous one has ended. Raises RuntimeError when not all of them ran.
    """
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    options: dict[str, Any] = {"OVERLAP": overlap, "num_warps": 1} | ({"launch_pdl": True} if overlap else {})

    def chain(n_kernels: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(n_kernels):
                launch(_node_kernel, 1, counter, **options)

        run()  # compiles the kernel
        if device.type != "cuda":
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    chains = {n: chain(n) for n in (1, 1 + n_nodes)}
    counter.zero_()
    chains[1 + n_nodes]()
    if counter != 1 + n_nodes:
        raise RuntimeError(f"{int(counter)} of {1 + n_nodes} kernels of a graph ran")
    few, many = (operations.time_call(call, device, budget_s)["median_s"] for call in chains.values())
    return {"nodes": n_nodes, "overlap": overlap, "median_s": (many - few) / n_nodes}
