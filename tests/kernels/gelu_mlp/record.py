"""The record of gelu_mlp (`records.Record`)."""

from typing import Any

import torch
import triton.language as tl
from fastgpt_kernels.operations.gelu_mlp import kernels
from records import Record, Shapes

from .formula import several_programs


def shapes_of(*shape: int, has_residual: bool = False) -> Shapes:
    weights = {"fc_weight": (16, 40), "fc_bias": (40,), "proj_weight": (40, 16), "proj_bias": (16,)}
    return {"x": shape, **weights, **({"residual": shape} if has_residual else {})}


def with_dropout(n: int) -> tuple[Shapes, dict[str, Any]]:
    options = {"activation": "silu", "dropout_p": 0.25, "seed": torch.tensor(3)}
    return shapes_of(3, n, 16, has_residual=True), options


def launch(n_rows: int, n_cols: int, stride: int) -> None:
    x, seed = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    sizes: dict[str, Any] = {"n_rows": n_rows, "n_cols": n_cols, "n_inner": 128}
    block: dict[str, Any] = {"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_INNER": 64, "ACCUMULATOR": tl.float32}
    block |= {"WEIGHT_TRANSPOSED": False, "DESCRIPTORS": False, "PRECISION": "ieee"}
    dropout: dict[str, Any] = {"threshold": 9, "HAS_DROPOUT": True}
    grid = (-(-n_rows // 64) * -(-n_cols // 64),)
    names = "fwd_hidden", "fwd_out", "bwd_pre", "bwd_product"
    fwd_hidden, fwd_out, bwd_pre, bwd_product = (getattr(kernels, f"_gelu_mlp_{name}_kernel")[grid] for name in names)
    fwd_hidden(*[x] * 5, stride, stride, **sizes, **block, ACTIVATION="gelu", STORE_PRE=True)
    fwd_out(*[x] * 4, seed, x, *[stride] * 3, **sizes, **block, **dropout, HAS_RESIDUAL=True)
    bwd_pre(*[x] * 6, stride, stride, **sizes, **block, ACTIVATION="gelu_new", STORE_HIDDEN=True)
    tile = {"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "STORE_DPRODUCT": True, "ACCUMULATOR": tl.float32}
    bwd_product(x, seed, x, x, stride, n_rows, n_cols, **dropout, **tile)


RECORDS = {
    "gelu_mlp": Record(
        forms={"plain": lambda n: (shapes_of(3, n, 16), {}), "residual, dropout": with_dropout},
        empty=[shapes_of(0, 16), shapes_of(0, 3, 16)],
        several_programs=several_programs,
        huge={
            "many rows": lambda: launch(2**23, 1024, 1024),
            "very many rows": lambda: launch(2**29, 16, 16),
            "rows far apart": lambda: launch(2**11, 1024, 2**22),
            "many columns": lambda: launch(1024, 2**23, 2**23),
        },
    )
}
