"""The decode step of more rows than the fused kernels take, on norms and products that are kernels of their own."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, drawn_again, max_error
from fastgpt_kernels.common.activations import ACTIVATIONS
from fastgpt_kernels.common.decode_weights import Matrix
from fastgpt_kernels.common.int4 import Int4Matrix
from fastgpt_kernels.common.int8 import Int8Matrix
from fastgpt_kernels.operations.decode_step import op as decode_step_op
from fastgpt_kernels.operations.decode_step import tiles as decode_step_tiles
from fastgpt_kernels.operations.decode_step.op import DecodeStep
from fastgpt_kernels.operations.decode_step.reference import multiply
from interpreter import DEVICE
from models import tiny_config
from torch import Tensor

import fastgpt
from fastgpt.generate import view_weights

from .cases import HALVES, assert_case, decode, filled_cache, make_case

pytestmark = pytest.mark.usefixtures("without_gradients")


def a_step(n_rows: int, dtype: torch.dtype) -> DecodeStep:
    model: Any = fastgpt.GPT2LMHeadModel(tiny_config())
    return DecodeStep(view_weights(model.to(DEVICE, dtype)), n_rows, 8)


KINDS = "", "int8", "int4"


def stored_as(kind: str, numbers: Tensor, dtype: torch.dtype) -> Matrix:
    if kind == "int4":
        return Int4Matrix.nearest(numbers, 32)
    return Int8Matrix.nearest(numbers) if kind == "int8" else numbers.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "int8"), (torch.float32, "int4"), *product(HALVES, KINDS)], ids=str
)
@pytest.mark.parametrize(("n_rows", "n_in", "n_out"), [(1, 64, 48), (17, 50, 67), (70, 131, 65), (16, 513, 32)])
def test_the_product_of_many_rows(n_rows: int, n_in: int, n_out: int, dtype: torch.dtype, kind: str) -> None:
    if kind == "int4":
        n_in = n_in // 32 * 32
    torch.manual_seed(0)
    x, bias = torch.randn(n_rows, n_in).to(dtype), torch.randn(n_out).to(dtype)
    numbers = torch.randn(n_in, n_out) * torch.logspace(-2, 1, n_out)
    matrix = stored_as(kind, numbers, dtype)
    floats = matrix.double() if isinstance(matrix, Tensor) else matrix.to_float(torch.float64)
    step, draws = a_step(n_rows, dtype), [drawn_again(x, seed) for seed in range(8)]
    for activation in ("none", "gelu_new"):
        act = ACTIVATIONS.get(activation, lambda y: y)
        truth, eager = act(multiply(x.double(), floats, bias.double())), act(multiply(x, matrix, bias))
        eager_error = max(
            max_error(act(multiply(draw, stored, bias)), act(multiply(draw.double(), floats, bias.double())))
            for draw in draws
            for stored in (floats.to(dtype), floats.to(dtype).contiguous())
        )
        y = torch.full((n_rows, n_out), float("nan"), dtype=dtype)
        step._product(x, matrix, bias, activation, y)
        assert_as_accurate(y, eager, truth, eager_error=eager_error)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_parts_of_a_product(dtype: torch.dtype) -> None:
    """Each is the sum over its own columns, without a bias; the last part has fewer."""
    torch.manual_seed(0)
    x, matrix = torch.randn(20, 300).to(dtype), torch.randn(300, 70).to(dtype)
    parts = torch.full((3, 20, 70), float("nan"))
    a_step(20, dtype)._product(x, matrix, None, "none", parts, cols_per_part=128)
    for part, columns, weights in zip(parts, x.split(128, 1), matrix.split(128), strict=True):
        exact = columns.double() @ weights.double()
        assert max_error(part, exact) <= 1e-6 * exact.abs().max()


def test_bug_the_last_norm_stored_over_the_row_that_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 channels lie in two threads each, of which one could read what the other had stored: seen in PTX."""
    rows: list[tuple[Tensor, Tensor | None]] = []

    def note(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        if kernel is decode_step_op._decode_norm_kernel:
            rows.append((arguments[0], arguments[5]))
        launch(kernel, n_programs, *arguments, **options)

    launch = decode_step_op.launch
    monkeypatch.setattr(decode_step_op, "launch", note)
    assert_case(make_case(torch.bfloat16, [0] * 9, n_embd=64, n_head=1))
    assert rows
    for read, stored in rows:
        assert stored is None or stored.data_ptr() != read.data_ptr()


@pytest.mark.parametrize("n_rows", [1, 9, 64, 65, 200])
@pytest.mark.parametrize("n_cols", [2, 100, 128, 768, 1600, 3072, 6400, 8192])
def test_parts_cover_the_inner_axis(n_rows: int, n_cols: int) -> None:
    """No part is empty, and more rows, which need fewer parts, change the sums of no row while one tile holds them."""
    for n_out in (2, 768, 1600, 2048):
        n_parts, cols = decode_step_tiles.decode_product_parts(n_rows, n_cols, n_out)
        assert (n_parts - 1) * cols < n_cols <= n_parts * cols
        assert n_rows > 64 or (n_parts, cols) == decode_step_tiles.decode_product_parts(1, n_cols, n_out)


def test_which_products_the_kernel_takes() -> None:
    """Half precision where launches overlap, and int8 everywhere, because torch does not multiply it."""
    takes = decode_step_tiles.decode_multiplies
    assert takes(64, 2, "sm_90")
    assert not takes(65, 2, "sm_90")
    assert not takes(9, 2, "sm_80")
    assert not takes(9, 4, "sm_90")
    assert takes(500, 1, "gfx942")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_has_the_same_logits_beside_any_others(dtype: torch.dtype) -> None:
    """The kernels of 9 to 16 rows compute each row by itself, in the same order."""
    case = make_case(dtype, [0, 3, 0, 1, 4, 0, 2, 0, 5, 0, 0, 7, 0, 1, 0, 2], n_tokens=12)
    expected = decode(case, filled_cache(case, 12))
    n_rows = 9
    for layer in case.past.layers:
        layer.keys, layer.values = layer.keys[:n_rows], layer.values[:n_rows]
    fewer = replace(case, ids=case.ids[:n_rows], starts=case.starts[:n_rows])
    found = decode(fewer, filled_cache(fewer, 12))
    # torch multiplies by the head.
    torch.testing.assert_close(found, expected[:n_rows], rtol=0, atol=1e-6)
