"""Tokens/s compared with transformers on the same weights: workloads, parity gate, timed runs, tables and plots."""

from ..progress import Progress, progress_bar
from .against_torch import measure_against_torch
from .parity import ParityError
from .plotting import plot, render
from .runs import (
    SCHEMA,
    BenchmarkOptions,
    MakeWork,
    bring_together,
    compare,
    make_tokens,
    rotated,
    run_benchmark,
    run_series,
    spread,
)

__all__ = [
    "SCHEMA",
    "BenchmarkOptions",
    "MakeWork",
    "ParityError",
    "Progress",
    "bring_together",
    "compare",
    "make_tokens",
    "measure_against_torch",
    "plot",
    "progress_bar",
    "render",
    "rotated",
    "run_benchmark",
    "run_series",
    "spread",
]
