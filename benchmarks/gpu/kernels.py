"""Steps of `benchmarks gpu` for single operations: the kernels' tests, the GPU's limits, times against torch's."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastgpt_kernels.common import chip
from torch import Tensor

from fastgpt import ops
from fastgpt.accounting import Shape
from fastgpt.bench import machine, operations
from fastgpt.bench.parity import ParityError

from ..peers import contenders as peers
from . import steps as single_steps
from . import waits
from .run import ROOT, Part, Run

# --- the kernels' tests ---------------------------------------------------------------------------------------------


# Many tests run an operation's reference, on the CPU, and then its kernel. The ids of the former begin with this.
WITHOUT_REFERENCES = ["-k", "not [reference"]


# A group of tests is stopped then; those that hang say where. What pytest has to say after that takes a while.
_TESTS_LIMIT_S, _HANGS_S, _LAST_WORDS_S = 200.0, 100, 40.0


def tests(run: Run) -> Iterator[Part]:
    """The tests of the kernels on this device, those of a folder at once: a process of pytest takes long to start."""
    for folder, files in run.extent.tests.items():
        measure = partial(run_tests, files, run.extent.n_processes, _TESTS_LIMIT_S)
        yield Part(folder, measure, _TESTS_LIMIT_S + _LAST_WORDS_S)


def run_tests(tests: Sequence[str], n_processes: int, limit_s: float) -> dict[str, Any]:
    """Whether the tests passed, which failed, and the table of errors; also of tests that were stopped."""
    options = ["-q", "-p", "no:cacheprovider", "--accuracy-table", *WITHOUT_REFERENCES]
    command = [sys.executable, "-m", "pytest", *tests, *options, "-o", f"faulthandler_timeout={_HANGS_S}"]
    if n_processes > 1:
        command += ["-n", str(n_processes)]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    stopped = ""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # upon which pytest says what has failed so far
        stopped = f"stopped after {limit_s:.0f} s: "
        output, _ = process.communicate()
    lines = output.splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no summary")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    found = {"summary": summary, "accuracy": [line for line in lines if line.startswith("│")]}
    if process.returncode != 0:
        return found | {"fault": stopped + summary, "failures": failures, "output": output[-20000:]}
    return found


# --- ceilings -------------------------------------------------------------------------------------------------------


def rates(run: Run) -> Iterator[Part]:
    """Bandwidth in bytes/s and matrix rate in FLOP/s, the ceilings of everything that follows."""
    if run.extent.is_dry:
        measured = {"bandwidth": 1e9, "matrix_rate": 1e9}
    else:
        measured = machine.measure_rates(run.extent.device, run.extent.dtype)
    for name, rate in measured.items():
        yield Part(name, lambda rate=rate: rate)


def wait_times(run: Run) -> Iterator[Part]:
    """An empty grid barrier, and a node of a CUDA graph: the fixed costs of the decode tiers."""
    device, row_s = run.extent.device, run.extent.row_s
    n_times = 2 if run.extent.is_dry else 200
    yield Part("grid barrier", partial(waits.barrier_seconds, device, n_times, row_s))
    yield Part("graph node", partial(waits.node_seconds, device, False, n_times, row_s))
    if chip.overlaps_launches(device):
        yield Part("graph node, overlapped", partial(waits.node_seconds, device, True, n_times, row_s))


def ceilings(run: Run) -> Iterator[Part]:
    """A copy, a read, a large product, and the library's own rate in every product of GPT-2."""
    n_bytes, width = (2**16, 64) if run.extent.is_dry else (2**32, 8192)
    yield Part("memory", partial(_memory_rates, run, n_bytes))
    yield Part("large product", partial(_product, run, width, width, width, bias=False))
    for size, shape in run.extent.shapes.items():
        yield Part(f"products {size}", partial(_products, run, shape))


def _memory_rates(run: Run, n_bytes: int) -> dict[str, float]:
    """Bytes/s of a copy (read and written) and of a sum (read)."""
    source = torch.ones(n_bytes // 4, device=run.extent.device)
    target = torch.empty_like(source)
    copy, read = (
        operations.time_call(call, run.extent.device, run.extent.row_s)
        for call in (lambda: target.copy_(source), source.sum)
    )
    return {"copy": 2 * n_bytes / copy["median_s"], "read": n_bytes / read["median_s"]}


def _products(run: Run, shape: Shape) -> list[dict[str, Any]]:
    """The rates for the rows of a decode step, of a batch of them, and of a prefill."""
    C, F, V = shape.n_embd, shape.hidden_width, shape.vocab_size
    products = {"qkv": (C, 3 * C), "projection": (C, C), "fc": (C, F), "mlp projection": (F, C), "head": (C, V)}
    return [
        {"product": name} | _product(run, n_rows, *sizes, bias=name != "head")
        for name, sizes in products.items()
        for n_rows in (*run.extent.decode_batches, run.extent.n_batch * run.extent.n_tokens)
    ]


def _product(run: Run, n_rows: int, n_in: int, n_out: int, *, bias: bool) -> dict[str, Any]:
    """torch.addmm, or torch.mm with the transpose of (out, in), which is how the head is stored."""

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=run.extent.device).to(run.extent.dtype)

    x = random(n_rows, n_in)
    if bias:
        call = partial(torch.addmm, random(n_out), x, random(n_in, n_out))
    else:
        call = partial(torch.mm, x, random(n_out, n_in).t())
    timing = operations.time_call(call, run.extent.device, run.extent.row_s)
    n_bytes = (n_rows * n_in + n_in * n_out + n_rows * n_out) * run.extent.dtype.itemsize
    speed = {"flops_per_s": 2 * n_rows * n_in * n_out / timing["median_s"], "bytes_per_s": n_bytes / timing["median_s"]}
    return {"rows": n_rows, "in": n_in, "out": n_out} | speed | timing


# --- operations -----------------------------------------------------------------------------------------------------


def kernels(run: Run, size: str) -> Iterator[Part]:
    """Every operation at one size, checked and then timed in turn with torch's and its peers'."""
    extent = run.extent
    for case in operations.cases(extent.shapes[size], extent.n_batch, extent.n_tokens, extent.device, extent.dtype):
        yield Part(case.operation, partial(_operation, run, case, extent.shapes[size]))


def steps(run: Run, size: str) -> Iterator[Part]:
    """A decode step and the choices of a token at one size, each alone, beside torch's in a CUDA graph of their own."""
    extent = run.extent
    shape, batches = extent.shapes[size], extent.decode_batches
    for case in single_steps.cases(shape, batches, extent.decode_context, extent.device, extent.dtype):
        yield Part(case.operation, partial(_operation, run, case, shape))


def _operation(run: Run, case: operations.Case, shape: Shape) -> list[dict[str, Any]]:
    """Time one operation. Raises ParityError if its results are wrong: a wrong operation gets no figure."""
    with ops.backend("triton"):  # "auto" would time the reference in place of a kernel that cannot run
        if fault := operations.check(case):
            raise ParityError(fault)
        run.say(f"  {case.operation}: agrees")
        case, left_out = peers.with_peers(case, shape)
        return operations.measure(case, run.result["rates"], run.extent.row_s) + left_out
