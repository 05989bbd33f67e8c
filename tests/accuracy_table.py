"""The table that `pytest --accuracy-table` ends with: the error of each operation compared with eager torch.

A case is one comparison of `accuracy.assert_parity`. Its ratio is the largest error of the operation over that of eager
torch in the same dtype, one ulp of the largest value granted: `error / (eager + ulp / factor)`, so that a ratio up to
the factor (1.25 forward, 1.5 for gradients) passes. Cases with slack, the random ones and those in
which eager has luck, pass at a multiple of that; they have columns of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

PARTS = ("forward", "gradients")


@dataclass
class Worst:
    """Over the cases of one kind."""

    n_cases: int = 0
    ratio: float = 0.0

    def add(self, n_cases: int, ratio: float) -> None:
        self.n_cases, self.ratio = self.n_cases + n_cases, max(self.ratio, ratio)


# (operation, implementation, dtype, part, whether with slack) -> the worst so far in this process.
_worst: dict[tuple[str, str, str, str, bool], Worst] = {}


def record(function: Callable, dtype: object, part: str, ratio: float, has_slack: bool) -> None:
    """Take note of one case; functions that run no operation of fastgpt_kernels are left out."""
    operation = _operation(function)
    if operation is not None:
        implementation = "torch" if operation.__module__.endswith(".reference") else "triton"
        key = operation.__name__, implementation, str(dtype).removeprefix("torch."), part, has_slack
        _worst.setdefault(key, Worst()).add(1, ratio)


def _operation(function: Any) -> Callable | None:
    """The operation of fastgpt_kernels that a function is, or that it was made from with `partial`."""
    if isinstance(function, partial):
        found = (_operation(part) for part in (function.func, *function.args))
        return next((operation for operation in found if operation is not None), None)
    return function if getattr(function, "__module__", "").startswith("fastgpt_kernels") else None


# --- pytest ---------------------------------------------------------------------------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of a process of pytest-xdist
        session.config.workeroutput["accuracy"] = [(*key, w.n_cases, w.ratio) for key, w in _worst.items()]  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for *key, n_cases, ratio in getattr(node, "workeroutput", {}).get("accuracy", []):
        _worst.setdefault(tuple(key), Worst()).add(n_cases, ratio)  # type: ignore[arg-type]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    table = Table("operation", "on", "dtype", title="Worst error beside eager torch (cases)", title_justify="left")
    for part, factor in zip(PARTS, (1.25, 1.5), strict=True):
        table.add_column(f"{part} <= {factor}", justify="right")
        table.add_column(f"{part}, slack", justify="right")
    for row in sorted({key[:3] for key in _worst}):
        cells = [_worst.get((*row, part, has_slack)) for part in PARTS for has_slack in (False, True)]
        table.add_row(*row, *(f"{worst.ratio:.2f} ({worst.n_cases})" if worst else "" for worst in cells))
    console = Console(file=terminalreporter._tw._file, width=120)
    console.print(table)
    console.print(f"{sum(worst.n_cases for key, worst in _worst.items() if key[4])} comparisons with slack")
