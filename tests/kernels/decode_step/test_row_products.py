"""The products of a few rows on tensor cores hold every bit of rows in float32."""

import pytest
import torch
import triton
import triton.language as tl
from fastgpt_kernels.operations.decode_step.row_products import _rows_times
from interpreter import DEVICE


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, y_ptr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    SLICES: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    rows, cols, outs = tl.arange(0, ROWS), tl.arange(0, IN), tl.arange(0, OUT)
    x = tl.load(x_ptr + rows[:, None] * IN + cols[None, :])
    if IS_TRANSPOSED:
        weight = tl.load(weight_ptr + outs[:, None] * IN + cols[None, :])
    else:
        weight = tl.load(weight_ptr + cols[:, None] * OUT + outs[None, :])
    y = _rows_times(x, weight, SLICES, IS_TRANSPOSED)
    tl.store(y_ptr + rows[:, None] * OUT + outs[None, :], y)


def product(x: torch.Tensor, weight: torch.Tensor, slices: int, is_transposed: bool) -> torch.Tensor:
    y = x.new_full((len(x), weight.shape[0 if is_transposed else 1]), float("nan"), dtype=torch.float32)
    sizes = {"ROWS": len(x), "IN": x.shape[1], "OUT": y.shape[1]}
    _product_kernel[(1,)](x, weight, y, **sizes, SLICES=slices, IS_TRANSPOSED=is_transposed)  # type: ignore[arg-type]
    return y


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("n_rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_rows_are_not_rounded(dtype: torch.dtype, n_rows: int, is_transposed: bool) -> None:
    """One weight in each row of the matrix, so that no sum rounds: the products have all bits of x."""
    torch.manual_seed(0)
    x = torch.randn(n_rows, 64, device=DEVICE)
    weight = torch.zeros(64, 64, device=DEVICE)
    weight[torch.arange(64), torch.randperm(64)] = 2.0 ** torch.randint(0, 6, (64,), device=DEVICE)
    exact = x @ (weight.t() if is_transposed else weight)
    found = product(x, weight.to(dtype), slices=4, is_transposed=is_transposed)
    # float16 has no bits below 2^-24.
    allowed = 2.0**-25 * 32 if dtype == torch.float16 else 0.0
    assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 128, device=DEVICE).to(dtype), torch.randn(128, 32, device=DEVICE)
    for matrix in (weight.to(dtype), (20 * weight).to(torch.int8)):
        exact = x.double() @ matrix.double()
        assert (product(x, matrix, slices=8, is_transposed=False) - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_slices_differ_in_rounding_only() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 128, device=DEVICE), torch.randn(128, 32, device=DEVICE).bfloat16()
    with_slices, without = (product(x, weight, slices, is_transposed=False) for slices in (8, 0))
    assert (with_slices - without).abs().max() <= 1e-6 * without.abs().max()
