"""The decode step on the kernels with int8 and int4 weights, against float64 on the same rounded weights."""

from itertools import product
from typing import Any

import pytest
import torch
from fastgpt_kernels.operations.decode_step import tiles as decode_step_tiles

from .cases import assert_case, make_case

pytestmark = pytest.mark.usefixtures("without_gradients")

# --- int8 weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5, 9])
def test_int8_weights_by_the_factor_rule(dtype: torch.dtype, n_rows: int) -> None:
    """Beside float64 on the rounded weights, exactly.

    Kernels multiply each sum by a scale: one rounding more than eager, whose weights are exact in float32.
    """
    # On trained-like weights, float32's errors differ by factors from draw to draw, whatever computes them.
    trained = n_rows == 5 and dtype == torch.bfloat16
    starts = [0, 3, 0, 1, 4, 0, 2, 0, 5][:n_rows]
    assert_case(make_case(dtype, starts, bits=8, rounded_head=n_rows != 5, trained=trained), n_ulps=2)


@pytest.mark.parametrize("n_rows", [1, 9])
@pytest.mark.parametrize(
    "changes", [{"n_embd": 66, "n_head": 1}, {"n_inner": 100, "activation_function": "relu", "n_layer": 1}], ids=str
)
def test_int8_weights_of_ragged_shapes(changes: dict[str, Any], n_rows: int) -> None:
    starts = [2, 0, 0, 1, 4, 0, 3, 0, 1][:n_rows]
    assert_case(make_case(torch.float32, starts, bits=8, rounded_head=True, **changes), n_ulps=2)


# --- int4 weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5, 9])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_weights_by_the_factor_rule(dtype: torch.dtype, n_rows: int, group_size: int) -> None:
    """As for int8 weights, the truth is float64 on the rounded weights."""
    starts = [0, 3, 0, 1, 4, 0, 2, 0, 5][:n_rows]
    case = make_case(dtype, starts, bits=4, group_size=group_size, rounded_head=n_rows != 5, n_layer=1)
    assert_case(case, n_ulps=2)


@pytest.mark.parametrize("n_rows", [1, 4, 9])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 160, "n_head": 2, "group_size": 32},
        {"n_embd": 192, "n_inner": 320},
        {"n_embd": 128, "n_inner": 64, "n_head": 1, "activation_function": "relu"},
    ],
    ids=str,
)
def test_int4_weights_of_ragged_shapes(changes: dict[str, Any], n_rows: int) -> None:
    """Widths that are no power of two, and parts of a product that end within a block."""
    starts = [2, 0, 0, 1, 4, 0, 3, 0, 1][:n_rows]
    assert_case(make_case(torch.float32, starts, bits=4, rounded_head=True, n_layer=1, **changes), n_ulps=2)


@pytest.mark.parametrize("architecture", ["cpu", "sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("n_cols", [16, 128, 800])
def test_bug_a_slice_of_int4_too_narrow_for_tensor_cores(n_cols: int, architecture: str) -> None:
    """With 16 columns, triton up to 3.7.1 multiplied 8 twice and 8 not at all; the interpreter was right."""
    for kernel, n_rows in product(("norm_product", "project", "head"), (1, 4)):
        tile = decode_step_tiles.decode_tile(kernel, n_rows, n_cols, 1, architecture, 128)
        assert tile.block_cols >= max(128, n_cols)
        assert not tile.slices or tile.block_cols // tile.slices >= 32


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("n_cols", [128, 768, 1280, 1600, 6400])
def test_groups_are_not_divided_among_the_parts_of_a_product(n_cols: int, group_size: int) -> None:
    for n_out in (128, 768, 1600):
        n_parts, cols = decode_step_tiles.decode_parts(n_cols, n_out, group_size)
        assert cols % group_size == 0
        assert (n_parts - 1) * cols < n_cols <= n_parts * cols
        assert decode_step_tiles.decode_product_parts(1, n_cols, n_out)[1] % group_size == 0
