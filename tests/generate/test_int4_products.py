"""The products with int4 weights on a CPU: in torch's layout of them, and as int8 weights."""

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from chosen_products import assert_step_equals_blocks, exact, largest_eager_error
from fastgpt_kernels.common.int4 import Int4Matrix
from fastgpt_kernels.operations.decode_step.reference import multiply
from models import pair, tiny_config

import fastgpt
from fastgpt import generate as engine
from fastgpt.generate import implementations, products
from fastgpt.generate.implementations import Rows, implementations_of
from fastgpt.generate.products import Products
from fastgpt.model import digits

pytestmark = pytest.mark.usefixtures("in_torch")

needs_the_product = pytest.mark.skipif(not implementations.multiplies_int4(), reason="torch multiplies no int4 here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize(("n_inputs", "n_outputs", "group_size"), [(96, 131, 32), (128, 64, 64), (128, 33, 128)])
@pytest.mark.parametrize("overflows", [False, True])
def test_every_implementation_gives_the_product_of_int4_weights(
    overflows: bool, n_inputs: int, n_outputs: int, group_size: int, n_rows: int, dtype: torch.dtype, monkeypatch
) -> None:
    """Beside float64 on the rounded weights, with columns of other sizes than torch's product takes."""
    if overflows:
        monkeypatch.setattr(digits, "is_exact", lambda product: False)
    torch.manual_seed(n_rows)
    matrix = Int4Matrix.nearest(torch.randn(n_inputs, n_outputs) * torch.logspace(-2, 1, n_outputs), group_size)
    x, bias = torch.randn(n_rows, n_inputs).to(dtype), torch.randn(n_outputs).to(dtype)
    x[0] *= 8
    rows = Rows(dtype, dtype)
    found = implementations_of(matrix, n_rows, rows)
    as_int8 = implementations_of(matrix.to_int8(), n_rows, rows)
    serves = dtype == torch.bfloat16 and implementations.multiplies_int4()
    assert list(found) == [f"as int8, {name}" for name in as_int8] + ["int4"] * serves
    floats = matrix.to_float(torch.float64)
    eager_error = largest_eager_error(x, matrix, bias)
    for implementation in found.values():
        prepared = implementation(matrix)
        assert_as_accurate(
            prepared(x, bias), multiply(x, matrix, bias), exact(x, floats, bias), eager_error=eager_error
        )
        assert prepared.n_bytes > 0


@needs_the_product
@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_decode_step_in_int4_equals_the_blocks(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1], bits=4, group_size=32, head=True).to(torch.bfloat16)
    chosen = assert_step_equals_blocks(ours, n_rows, "int4", monkeypatch)
    assert set(chosen.chosen.values()) == {"int4"}
    # Half a byte, and a step and a zero point in bfloat16 for each group; of the head, columns up to a multiple of 16.
    n_weights = 2 * 12 * 64 * 64 + 144 * 64
    assert chosen.n_bytes == n_weights // 2 + n_weights // 32 * 4


def test_rows_of_float32_are_not_rounded_to_bfloat16() -> None:
    matrix = Int4Matrix.nearest(torch.randn(64, 300), 32)
    assert "int4" not in implementations_of(matrix, 2, Rows(torch.float32, torch.float32))
    assert "int4" not in products._measure([matrix], 2, Rows(torch.float32, torch.float32))


def test_where_torch_has_no_product_of_int4_nothing_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", missing, raising=False)
    monkeypatch.setattr(products, "_measured", {})
    implementations.multiplies_int4.cache_clear()
    try:
        ours = fastgpt.quantize(pair(tiny_config())[1], bits=4, head=True).to(torch.bfloat16)
        chosen = Products(engine.view_weights(ours), 1, products.MIN_STEPS)
        assert chosen.chosen
        assert all(name.startswith("as int8, ") for name in chosen.chosen.values())
    finally:
        monkeypatch.undo()
        implementations.multiplies_int4.cache_clear()


def test_short_calls_unpack_int4_weights_once() -> None:
    weights = engine.view_weights(fastgpt.quantize(pair(tiny_config())[1], bits=4))
    chosen = Products(weights, 1, n_steps=2)
    name = "as int8, digits" if digits.is_exact(digits.Stored) else "as int8, copy, as stored"
    assert set(chosen.chosen.values()) == {name}
    assert chosen.n_bytes == (1 if "digits" in name else 4) * 2 * 12 * 64 * 64


def test_without_the_memory_int4_weights_are_unpacked_for_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_memory_for", lambda _: False)
    weights = engine.view_weights(fastgpt.quantize(pair(tiny_config())[1], bits=4))
    for n_steps in (2, products.MIN_STEPS):
        assert Products(weights, 1, n_steps).n_bytes == 0


def test_matrices_of_other_groups_are_timed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_measured", {})
    rows = Rows(torch.float32, torch.float32)
    numbers = torch.randn(128, 32)
    for group_size in (32, 64, 64):
        products.costs([Int4Matrix.nearest(numbers, group_size)], 1, rows)
    products.costs([Int4Matrix.nearest(numbers, 64).to_int8()], 1, rows)
    assert len(products._measured) == 3
