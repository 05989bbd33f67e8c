"""The products with int8 weights on a CPU: as stored, in digits, and from copies in floats."""

import pytest
import torch
from accuracy import assert_as_accurate
from chosen_products import assert_step_equals_blocks, exact, largest_eager_error
from fastgpt_kernels.common.int8 import Int8Matrix
from fastgpt_kernels.operations.decode_step.reference import multiply
from models import pair, tiny_config, token_ids

import fastgpt
from fastgpt import generate as engine
from fastgpt.generate import bags, implementations, products
from fastgpt.generate.implementations import Rows, implementations_of
from fastgpt.generate.products import Products
from fastgpt.model import digits

pytestmark = pytest.mark.usefixtures("in_torch")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [(96, 131), (50, 64)])
@pytest.mark.parametrize("overflows", [False, True])
def test_every_implementation_gives_the_product_of_int8_weights(
    overflows: bool, n_inputs: int, n_outputs: int, n_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside float64 on the rounded weights, exactly, with rows and columns of other sizes among the usual ones."""
    if overflows:
        monkeypatch.setattr(digits, "is_exact", lambda product: False)
    torch.manual_seed(n_rows)
    matrix = Int8Matrix.nearest(torch.randn(n_inputs, n_outputs) * torch.logspace(-2, 1, n_outputs))
    x, bias = torch.randn(n_rows, n_inputs).to(dtype), torch.randn(n_outputs).to(dtype)
    x[0] *= 8
    found = implementations_of(matrix, n_rows, Rows(dtype, dtype))
    # torch's product of int8 reads sixteen inputs at a time, and knows two of these dtypes whose sums cannot overflow.
    # Of float32 rows in digits nothing else is tried.
    serves = [name for name in BYTES if n_rows == 1 or name != "transposed digits"]
    in_digits = {name for name in serves if dtype in digits.N_DIGITS and digits.is_exact(BYTES[name])}
    is_tried = dtype == torch.bfloat16 or (dtype == torch.float32 and "digits" not in in_digits)
    assert ("int8" in found) == (n_inputs % 16 == 0 and is_tried)
    assert in_digits == found.keys() & BYTES
    assert ("bags" in found) == (dtype in digits.N_DIGITS and bags.adds_bytes())
    floats = matrix.to_float(torch.float64)
    eager_error = largest_eager_error(x, matrix, bias)
    for implementation in found.values():
        true, eager = exact(x, floats, bias), multiply(x, matrix, bias)
        assert_as_accurate(implementation(matrix)(x, bias), eager, true, eager_error=eager_error)


BYTES = {"digits": digits.Stored, "transposed digits": digits.Transposed, "packed digits": digits.Packed}
FLOATS = [dtype for dtype in digits.N_DIGITS if dtype.is_floating_point]


def each_exact_product(*n_rows: int) -> pytest.MarkDecorator:
    """Each product of bytes with each number of rows that it takes."""
    return pytest.mark.parametrize(
        ("name", "n_rows"),
        [
            pytest.param(name, n, marks=pytest.mark.skipif(not digits.is_exact(product), reason="bytes overflow here"))
            for name, product in BYTES.items()
            for n in n_rows
            if n == 1 or product is not digits.Transposed
        ],
    )


@each_exact_product(1, 33)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("most", [2**20, 1000], ids=["", "sliced"])
def test_digits_are_as_exact_as_the_rows(
    most: int, n_rows: int, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one input is far larger than the others, and in rows of zeros, of small and of large numbers."""
    monkeypatch.setattr(digits, "_MAX_PRODUCTS", most)
    torch.manual_seed(n_rows)
    matrix = Int8Matrix.nearest(torch.randn(768, 96) * torch.logspace(-2, 1, 96))
    x = torch.randn(n_rows, 768)
    x[:, 5] *= 300
    for factor in (1.0, 0.0, 1e-25, 1.0 if dtype == torch.float16 else 1e30):
        rows = torch.cat((x[:1] * factor, x[1:])).to(dtype)
        true, eager = exact(rows, matrix.to_float(torch.float64), None), multiply(rows, matrix, None)
        in_digits = digits.Digits(matrix, n_rows, dtype, BYTES[name])
        assert (len(in_digits.products) > 1) == (digits.N_DIGITS[dtype] * n_rows * 96 > most)
        product = in_digits(rows, None)
        assert product.dtype == dtype
        scale = true.abs().amax(1, keepdim=True).clamp(min=1e-30)  # each row by itself
        relative, eager = ((value / scale).float() for value in (product, eager))
        assert_as_accurate(relative, eager, true / scale, factor=1.0)


@each_exact_product(1, 5)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_one_digit_is_the_row_rounded_to_int8(n_rows: int, dtype: torch.dtype, name: str) -> None:
    """Each row by its own largest input, so that it does not depend on those beside it; a row of zeros stays zero."""
    torch.manual_seed(n_rows)
    matrix, bias = Int8Matrix.nearest(torch.randn(768, 96)), torch.randn(96, dtype=dtype)
    x = (torch.randn(n_rows, 768) * torch.logspace(-2, 1, n_rows)[:, None]).to(dtype)
    x[-1, 5], x[0] = 300, 0 if n_rows > 1 else x[0]
    largest = x.float().double().abs().amax(1, keepdim=True)
    rows = (127 * x.double() / largest).round().nan_to_num() * largest / 127
    true = rows @ matrix.to_float(torch.float64) + bias.double()
    product = digits.Digits(matrix, n_rows, torch.int8, BYTES[name])(x, bias)
    assert product.dtype == dtype
    error = (product.double() - true).abs() / true.abs().amax(1, keepdim=True)
    assert error.max() <= 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    alone = digits.Digits(matrix, 1, torch.int8, BYTES[name])(x[-1:].contiguous(), bias)
    assert torch.equal(alone, product[-1:])
    assert torch.allclose(digits.rounded(x), rows, rtol=1e-6, atol=0)


@each_exact_product(1, 3)
@pytest.mark.parametrize("precision", [torch.float32, torch.int8], ids=str)
def test_digits_keep_nan_in_its_row(precision: torch.dtype, n_rows: int, name: str) -> None:
    x = torch.ones(n_rows, 32)
    x[0, 7] = torch.nan
    matrix = Int8Matrix.nearest(torch.randn(32, 48))
    product = digits.Digits(matrix, n_rows, precision, BYTES[name])(x, torch.ones(48))
    assert product.isnan().any(1).tolist() == [True, False, False][:n_rows]
    assert product[0].isnan().all()


@each_exact_product(1, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_step_in_digits_equals_the_blocks(dtype: torch.dtype, n_rows: int, name: str, monkeypatch) -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1]).to(dtype)
    chosen = assert_step_equals_blocks(ours, n_rows, name, monkeypatch)
    assert chosen.n_bytes == (2 * 12 * 64 * 64 if name == "packed digits" else 0)  # a copy of the values


needs_bags = pytest.mark.skipif(not bags.adds_bytes(), reason="this torch has no bags of bytes")


@needs_bags
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("n_inputs", [768, 50])
def test_bags_are_as_exact_as_a_float_copy(n_inputs: int, n_rows: int) -> None:
    """With a last slice that is shorter, and one input far larger than the others."""
    torch.manual_seed(n_rows)
    matrix = Int8Matrix.nearest(torch.randn(n_inputs, 96) * torch.logspace(-2, 1, 96))
    x, bias = torch.randn(n_rows, n_inputs), torch.randn(96)
    x[:, 5] *= 300
    in_bags = bags.Bags(matrix)
    for added in (bias, None):
        true, eager_error = exact(x, matrix.to_float(torch.float64), added), largest_eager_error(x, matrix, added)
        assert_as_accurate(in_bags(x, added), multiply(x, matrix, added), true, eager_error=eager_error)
    assert torch.equal(in_bags(torch.zeros_like(x), bias), bias.expand(n_rows, -1))


@needs_bags
def test_bug_bags_were_made_for_one_number_of_rows() -> None:
    """A step of prompt lookup has as many rows as tokens were proposed: past them lay whatever was in memory."""
    in_bags, x = bags.Bags(Int8Matrix.nearest(torch.randn(96, 48))), torch.randn(4, 96)
    each = torch.cat([in_bags(row, None) for row in x.split(1)])
    for n_rows in (4, 1, 3):
        assert torch.equal(in_bags(x[:n_rows], None), each[:n_rows])


@needs_bags
def test_bags_keep_nan_in_its_row() -> None:
    x = torch.ones(3, 32)
    x[1, 7] = torch.nan
    product = bags.Bags(Int8Matrix.nearest(torch.randn(32, 48)))(x, torch.ones(48))
    assert product.isnan().any(1).tolist() == [False, True, False]
    assert product[1].isnan().all()


def test_without_bags_of_bytes_digits_are_left(monkeypatch) -> None:
    bags.adds_bytes.cache_clear()
    monkeypatch.setattr(torch.ops, "quantized", object())
    try:
        assert not bags.adds_bytes()
        assert "bags" not in implementations_of(
            Int8Matrix.nearest(torch.randn(64, 48)), 1, Rows(torch.float32, torch.float32)
        )
    finally:
        bags.adds_bytes.cache_clear()


@needs_bags
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_step_in_bags_equals_the_blocks(dtype: torch.dtype, n_rows: int, monkeypatch) -> None:
    assert_step_equals_blocks(fastgpt.quantize(pair(tiny_config())[1]).to(dtype), n_rows, "bags", monkeypatch)


def test_an_implementation_that_errs_is_not_taken(monkeypatch) -> None:
    """Rows in bfloat16 for a model in float32 are fast, and err thousands of times as much."""
    matrix, rows = Int8Matrix.nearest(torch.randn(64, 300)), Rows(torch.float32, torch.float32)
    found = implementations_of(matrix, 2, rows)
    in_bfloat16 = {"rounded": lambda matrix: implementations.Int8Values(matrix, torch.bfloat16)}
    monkeypatch.setattr(products, "implementations_of", lambda *_: found | in_bfloat16)
    assert products._measure([matrix], 2, rows).keys() == found.keys()


@pytest.mark.skipif(not digits.is_exact(digits.Stored), reason="bytes overflow here")
@pytest.mark.parametrize("n_steps", [2, products.MIN_STEPS])
@torch.no_grad()
def test_steps_round_their_rows_where_the_model_may(n_steps: int, monkeypatch) -> None:
    """As its blocks do, in all that generate: with the same tokens as from forwards without a cache."""
    ours = fastgpt.quantize(pair(tiny_config())[1], head=True, activations=True)
    ids = token_ids(2, 9, 131)
    made, digits_of = set(), digits.Digits.__init__
    monkeypatch.setattr(digits.Digits, "__init__", lambda *call: made.add(call[3]) or digits_of(*call))
    options = {"max_new_tokens": n_steps + 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for rows, more in ((ids, {}), (ids[:1], {"prompt_lookup_num_tokens": 3})):
        tokens = ours.generate(rows, **options, **more)
        assert made == {torch.int8}
        for _ in range(n_steps + 1):
            rows = torch.cat((rows, ours(rows, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(tokens, rows)


@torch.no_grad()
def test_no_row_is_rounded_where_bytes_overflow(monkeypatch) -> None:
    monkeypatch.setattr(products, "_measured", {})
    monkeypatch.setattr(digits, "is_exact", lambda product: False)
    exact, ours = (fastgpt.quantize(pair(tiny_config())[1], activations=rounds) for rounds in (False, True))
    ids = token_ids(2, 9, 131)
    assert torch.equal(ours(ids).logits, exact(ids).logits)
    chosen = Products(engine.view_weights(ours), 1, products.MIN_STEPS, precision=torch.int8)
    assert not any("digits" in name for name in chosen.chosen.values())


@pytest.mark.skipif(not digits.is_exact(digits.Stored), reason="bytes overflow here")
def test_short_calls_read_int8_weights_where_they_lie() -> None:
    weights = engine.view_weights(fastgpt.quantize(pair(tiny_config())[1]))
    chosen = Products(weights, 1, n_steps=2)
    assert set(chosen.chosen.values()) == {"digits"}
    assert chosen.n_bytes == 0


def test_short_calls_convert_int8_weights_once_where_bytes_overflow(monkeypatch) -> None:
    monkeypatch.setattr(digits, "is_exact", lambda product: False)
    weights = engine.view_weights(fastgpt.quantize(pair(tiny_config())[1]))
    chosen = Products(weights, 1, n_steps=2)
    assert set(chosen.chosen.values()) == {"copy, as stored"}
    assert chosen.n_bytes == 4 * 2 * 12 * 64 * 64


def test_without_the_memory_int8_weights_are_converted_for_each_product(monkeypatch) -> None:
    monkeypatch.setattr(products, "has_memory_for", lambda _: False)
    weights = engine.view_weights(fastgpt.quantize(pair(tiny_config())[1]))
    for n_steps in (2, products.MIN_STEPS):
        assert Products(weights, 1, n_steps).n_bytes == 0
