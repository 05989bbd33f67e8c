"""Where the time of fastgpt's own workloads goes: a trace for chrome://tracing and the most expensive operations."""

import os
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, record_function
from transformers import GPT2LMHeadModel

from ..accounting.shapes import shape_of
from ..load import DTYPES
from . import machine, workloads
from .runs import BenchmarkOptions, make_tokens


@dataclass(frozen=True)
class Expense:
    """An operation's own time without its callees, on the GPU where there is one. share: of all operations' time."""

    operation: str
    n_calls: int
    seconds: float
    share: float


def profile(
    options: BenchmarkOptions, file: str | os.PathLike[str], base: GPT2LMHeadModel | None = None
) -> list[Expense]:
    """Trace one run of each workload, after a warm-up run, into a JSON file (gzipped if its name ends in .gz).

    base: as `workloads.load_base` gives it; None loads it.
    In the trace, spans such as "fastgpt prefill" mark the workloads. Returns the operations, the most expensive first.
    """
    device, dtype = torch.device(str(options.device)), DTYPES[str(options.dtype)]
    if base is None:
        base, _ = workloads.load_base(options.model, random_weights=options.random_weights, seed=options.seed)
    ids = make_tokens(options, shape_of(base)).to(device)
    works = {
        workload: workloads.make_work(workload, workloads.OURS, base, ids, options.new_tokens, dtype)
        for workload in options.workloads
    }
    for work in works.values():
        work.run()
    machine.synchronize(device)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities, acc_events=True) as trace:
        for workload, work in works.items():
            with record_function(f"{workloads.OURS} {workload}"):
                work.run()
                machine.synchronize(device)
    trace.export_chrome_trace(os.fspath(file))
    return _expenses(list(trace.key_averages()), on_gpu=device.type == "cuda")


def _expenses(events: list[FunctionEventAvg], on_gpu: bool) -> list[Expense]:
    spans = {f"{workloads.OURS} {workload}" for workload in workloads.WORKLOADS}
    times_us = {
        str(event.key): (event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in events
        if event.key not in spans
    }
    total_us = sum(time_us for _, time_us in times_us.values()) or 1
    expenses = [
        Expense(operation, n_calls, time_us / 1e6, time_us / total_us)
        for operation, (n_calls, time_us) in times_us.items()
    ]
    return sorted(expenses, key=lambda expense: expense.seconds, reverse=True)


def render(expenses: list[Expense], console: Console, n: int = 10) -> None:
    """Print the n most expensive operations as a table on a rich console."""
    table = Table(title=f"The {n} most expensive operations of fastgpt", title_justify="left")
    table.add_column("operation", overflow="fold")
    for heading in ("calls", "own time", "share"):
        table.add_column(heading, justify="right")
    for expense in expenses[:n]:
        table.add_row(
            expense.operation, f"{expense.n_calls:,}", f"{1e3 * expense.seconds:,.2f} ms", f"{expense.share:.1%}"
        )
    console.print(table)
