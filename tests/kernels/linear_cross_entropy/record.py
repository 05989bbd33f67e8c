"""The record of linear_cross_entropy (`records.Record`)."""

from functools import partial
from typing import Any

import torch
import triton.language as tl
from fastgpt_kernels.operations.linear_cross_entropy import kernels
from records import Record, Shapes

from .formula import several_programs

N_VOCABULARY = 131


def reduced(n: int, **options: Any) -> tuple[Shapes, dict[str, Any]]:
    labels = torch.tensor([0, 4, -100, N_VOCABULARY - 1, 7]).repeat(n // 5 + 1)[:n]
    return {"hidden": (n, 16), "weight": (N_VOCABULARY, 16)}, {"labels": labels, **options}


def launch(n_rows: int, n_cols: int, stride: int) -> None:
    flags: dict[str, Any] = {"HAS_GRADIENT": True, "HAS_ROW_SCALE": True, "ACCUMULATOR": tl.float32}
    tile: dict[str, Any] = {"LANES": 2**17, "VECTOR": 8, "LABEL_SMOOTHING": 0.1, "Z_LOSS": 1e-4}
    x, labels = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    for ignore_index in (0, -100):  # labels are read as zeros
        kernels._linear_cross_entropy_kernel[(n_rows,)](  # pyright: ignore
            x, labels, x, x, logits_row_stride=stride, n_cols=n_cols, ignore_index=ignore_index, **tile, **flags
        )


RECORDS = {
    "linear_cross_entropy": Record(
        forms={
            **{reduction: partial(reduced, reduction=reduction) for reduction in ("mean", "sum", "none")},
            "mean, more terms": partial(reduced, reduction="mean", label_smoothing=0.1, z_loss=0.05),
            "none, more terms": partial(reduced, reduction="none", label_smoothing=0.1, z_loss=0.05),
        },
        empty=[],
        several_programs=several_programs,
        huge={
            "many rows": lambda: launch(2**23, 1000, 1024),
            "very many rows": lambda: launch(2**27, 64, 64),
            "rows far apart": lambda: launch(2**11, 9, 2**22),
        },
    )
}
