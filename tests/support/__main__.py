"""Prints docs/support.md: `PYTHONPATH=.:tests:kernels python -m support > docs/support.md`."""

import conftest  # noqa: F401 - settings that must be made first
import torch

from .page import TABLES, missing, observe, render

torch.set_num_threads(1)
cells = {
    (table, row.name, column): f"needs {missing(row)}" if missing(row) else observe(row, column)
    for table, (rows, columns) in TABLES.items()
    for row in rows
    for column in columns
}
print(render(cells), end="")
