"""The record of layer_norm and add_layer_norm (`records.Record`)."""

from typing import Any

import pytest
import torch
import triton.language as tl
from fastgpt_kernels.operations.layer_norm import kernels, tiles
from records import Record, Shapes


def shapes_of(*shape: int) -> Shapes:
    return {"x": shape, "weight": shape[-1:], "bias": shape[-1:]}


def sum_shapes_of(*shape: int) -> Shapes:
    return {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}


def several_programs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tiles, "layer_norm_bwd_programs", lambda x, tile: 7)
    patch.setattr(tiles, "layer_norm_reduce_partials", lambda architecture: 4)
    patch.setattr(tiles, "layer_norm_tile", lambda *_: tiles.LayerNormTile(64, 2, 4))


def launch_rows(n_rows: int, n_cols: int, stride: int) -> None:
    x, grid = torch.zeros(1), (n_rows // 2,)
    sizes: dict[str, Any] = {"x_row_stride": stride, "n_rows": n_rows, "n_cols": n_cols, "EPS": 1e-5}
    tile: dict[str, Any] = {"BLOCK_ROWS": 2, "BLOCK_COLS": 1024, "ACCUMULATOR": tl.float32}
    forward: dict[str, Any] = {"residual_row_stride": stride, "HAS_RESIDUAL": True}
    backward: dict[str, Any] = {
        "dy_row_stride": stride,
        "dsum_row_stride": stride,
        "HAS_DSUM": True,
        "HAS_DADDED": True,
    }
    kernels._layer_norm_fwd_kernel[grid](*[x] * 6, **forward, **sizes, **tile)  # pyright: ignore
    kernels._layer_norm_bwd_kernel[grid](*[x] * 8, **backward, **sizes, **tile)  # pyright: ignore


def launch_partial_sums() -> None:
    tile: dict[str, Any] = {"BLOCK_PARTIALS": 512, "BLOCK_COLS": 16, "ACCUMULATOR": tl.float32}
    kernels._layer_norm_bwd_reduce_kernel[(2**16,)](  # pyright: ignore
        *[torch.zeros(1)] * 4, n_partials=2**13, n_cols=2**20, **tile
    )


HUGE = {
    "many rows": lambda: launch_rows(2**23, 1024, 1024),
    "very many rows": lambda: launch_rows(2**30, 8, 8),
    "rows far apart": lambda: launch_rows(2**11, 1024, 2**22),
    "partial sums": launch_partial_sums,
}
NO_ELEMENTS = [(0, 8), (0, 5, 8), (3, 0)]
RECORDS = {
    "layer_norm": Record(
        forms={"plain": lambda n: (shapes_of(3, n, 24), {})},
        empty=[shapes_of(*shape) for shape in NO_ELEMENTS],
        several_programs=several_programs,
        huge=HUGE,
    ),
    "add_layer_norm": Record(
        forms={"plain": lambda n: (sum_shapes_of(3, n, 24), {"eps": 1e-3})},
        empty=[sum_shapes_of(*shape) for shape in NO_ELEMENTS],
        several_programs=several_programs,
        huge={},  # the kernels of layer_norm
    ),
}
