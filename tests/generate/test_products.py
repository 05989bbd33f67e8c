"""The products of decode steps on a CPU: every way gives the product, and a call takes the cheapest way."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, drawn_again, max_error
from fastgpt_kernels.common.int8 import Int8Matrix
from fastgpt_kernels.operations.decode_step.reference import multiply
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import Tensor

import fastgpt
from fastgpt import generate as engine
from fastgpt.generate import decoding, products
from fastgpt.generate.products import Cost, Products, Rows
from fastgpt.model import digits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LONG = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": products.MIN_STEPS + 8}


@pytest.fixture(autouse=True)
def in_torch() -> Iterator[None]:
    with fastgpt.backend("torch"):
        yield


def prefer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one way the cheapest wherever it can be taken."""

    def costs(matrices: list[Tensor], n_rows: int, rows: Rows) -> dict[str, Cost]:
        return {
            way: Cost(0.0, 1.0 if way == name else 2.0, copies=way == "packed")
            for way in products.ways(matrices[0], n_rows, rows)
        }

    monkeypatch.setattr(products, "costs", costs)


# --- each way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 5, 33])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [(64, 48), (96, 131), (50, 64)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_every_way_gives_the_product(
    n_inputs: int, n_outputs: int, by_columns: bool, n_rows: int, dtype: torch.dtype
) -> None:
    """Beside the product in float64, with a row that is larger than the others, and with and without a bias."""
    generator = torch.Generator().manual_seed(n_rows)
    matrix = torch.randn(n_inputs, n_outputs, generator=generator).to(dtype)
    matrix = matrix.t().contiguous().t() if by_columns else matrix
    x, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n_rows, n_inputs), (n_outputs,)))
    x[0] *= 8
    found = products.ways(matrix, n_rows)
    assert next(iter(found)) == "as stored"
    for n_slices in (2, 4):
        sliced = by_columns or (dtype.itemsize > 2 and n_inputs % n_slices == 0)
        assert (f"{n_slices} slices" in found) == sliced
    for added in (bias, None):
        true, eager = exact(x, matrix, added), multiply(x, matrix, added)
        # The largest of a few rounding errors is random, so eager's is taken over more rows like these. torch adds in
        # another order when the matrix is stored the other way, and may err twice as much.
        draws = [drawn_again(x, seed) for seed in range(8)]
        eager_error = max(
            max_error(multiply(row, stored, added), exact(row, matrix, added))
            for row in draws
            for stored in (matrix.contiguous(), matrix.t().contiguous().t())
        )
        for way in found.values():
            assert_as_accurate(way(matrix)(x, added), eager, true, eager_error=eager_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [(96, 131), (50, 64)])
@pytest.mark.parametrize("overflows", [False, True])
def test_every_way_gives_the_product_of_int8_weights(
    overflows: bool, n_inputs: int, n_outputs: int, n_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside float64 on the rounded weights, exactly, with rows and columns of other sizes among the usual ones."""
    if overflows:
        monkeypatch.setattr(digits, "is_exact", lambda product: False)
    torch.manual_seed(n_rows)
    matrix = Int8Matrix.nearest(torch.randn(n_inputs, n_outputs) * torch.logspace(-2, 1, n_outputs))
    x, bias = torch.randn(n_rows, n_inputs).to(dtype), torch.randn(n_outputs).to(dtype)
    x[0] *= 8
    found = products.ways(matrix, n_rows, Rows(dtype, dtype))
    # torch's product of int8 reads sixteen inputs at a time, and knows two of these dtypes whose sums cannot overflow.
    # Of float32 rows in digits nothing else is tried.
    in_digits = {name for name, product in BYTES.items() if dtype in digits.N_DIGITS and digits.is_exact(product)}
    is_tried = dtype == torch.bfloat16 or (dtype == torch.float32 and "digits" not in in_digits)
    assert ("int8" in found) == (n_inputs % 16 == 0 and is_tried)
    assert in_digits == found.keys() & BYTES
    floats = matrix.to_float(torch.float64)
    draws = [drawn_again(x, seed) for seed in range(8)]
    eager_error = max(max_error(multiply(row, matrix, bias), exact(row, floats, bias)) for row in draws)
    for way in found.values():
        true, eager = exact(x, floats, bias), multiply(x, matrix, bias)
        assert_as_accurate(way(matrix)(x, bias), eager, true, eager_error=eager_error)


BYTES = {"digits": digits.Stored, "packed digits": digits.Packed}
each_exact_product = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not digits.is_exact(product), reason="bytes overflow here"))
        for name, product in BYTES.items()
    ],
)


@each_exact_product
@pytest.mark.parametrize("dtype", digits.N_DIGITS, ids=str)
@pytest.mark.parametrize("n_rows", [1, 33])
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


@each_exact_product
def test_digits_keep_nan_in_its_row(name: str) -> None:
    x = torch.ones(3, 32)
    x[1, 7] = torch.nan
    matrix = Int8Matrix.nearest(torch.randn(32, 48))
    product = digits.Digits(matrix, 3, torch.float32, BYTES[name])(x, torch.ones(48))
    assert product.isnan().any(1).tolist() == [False, True, False]
    assert product[1].isnan().all()


@each_exact_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_decode_step_in_digits_equals_the_blocks(dtype: torch.dtype, name: str, monkeypatch) -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1]).to(dtype)
    ids, positions = token_ids(3, 9, 131), torch.arange(9)[None]
    expected = ours(ids).logits[:, -1]
    prefer(name, monkeypatch)
    weights = engine.view_weights(ours)
    chosen = Products(weights, 3, products.MIN_STEPS)
    assert name in chosen.chosen.values()
    assert chosen.n_bytes == (2 * 12 * 64 * 64 if name == "packed digits" else 0)  # a copy of the values
    cache = engine.KVCache.allocate(ours, 3, 9)
    engine.prefill(ours, cache, ids[:, :8], None, positions[:, :8])
    logits = engine.decode_one_token(weights, cache, ids[:, 8], positions[:, 8], chosen)
    assert_same_within_rounding(logits, expected, n_ulps=64 if dtype == torch.float32 else 4)


def test_a_way_that_errs_is_not_taken(monkeypatch) -> None:
    """Rows in bfloat16 for a model in float32 are fast, and err thousands of times as much."""
    matrix, rows = Int8Matrix.nearest(torch.randn(64, 300)), Rows(torch.float32, torch.float32)
    found = products.ways(matrix, 2, rows)
    in_bfloat16 = {"rounded": lambda matrix: products.Int8Values(matrix, torch.bfloat16)}
    monkeypatch.setattr(products, "ways", lambda *_: found | in_bfloat16)
    assert products._measure([matrix], 2, rows).keys() == found.keys()


def test_a_model_in_bfloat16_has_its_rows_rounded_to_it_alone_by_int8(slow_halves: None) -> None:
    """Where the processor has no instructions for bfloat16, its copy in float32 multiplies int8 by bfloat16 rows."""
    ours = fastgpt.quantize(pair(tiny_config())[1].to(torch.bfloat16))
    weights = engine.view_weights(decoding.in_fast_dtype(ours))
    assert weights.wte.dtype == torch.float32
    chosen = Products(weights, 1, n_steps=2, precision=torch.bfloat16)
    assert set(chosen.chosen.values()) == {"int8"}
    assert chosen.n_bytes == 0
    matrix: Any = weights.layers[0].fc_weight
    bias, x = weights.layers[0].fc_bias, torch.randn(1, 64)
    expected = multiply(x.bfloat16().double(), matrix.to_float(torch.float64), bias.double())
    assert_as_accurate(chosen(x, matrix, bias).bfloat16(), multiply(x.bfloat16(), matrix, bias.bfloat16()), expected)


@each_exact_product
def test_short_calls_read_int8_weights_where_they_lie(name: str) -> None:
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


def exact(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(x.double(), matrix.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_onednn_packs_what_the_processor_multiplies(dtype: torch.dtype) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert "packed" in products.ways(torch.randn(32, 48).to(dtype), n_rows=1)


def test_a_type_that_onednn_refuses_is_not_packed() -> None:
    assert "packed" not in products.ways(torch.randn(32, 48, dtype=torch.float64), n_rows=1)


def test_slices_read_the_weights_where_they_lie() -> None:
    """A view sees a change of the weights, and takes no memory; a packed copy says how large it is."""
    for matrix in (torch.randn(32, 48), torch.randn(48, 32).t()):
        for name, way in products.ways(matrix, 1).items():
            prepared, x = way(matrix), torch.ones(1, 32)
            assert prepared.n_bytes == (32 * 48 * 4 if name == "packed" else 0)
            before = prepared(x, None)
            with torch.no_grad():
                matrix += 1
            assert torch.allclose(prepared(x, None), before) == (name == "packed")


@pytest.mark.parametrize("name", ["as stored", "transposed", "2 slices", "4 slices", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 8])
@torch.no_grad()
def test_a_decode_step_equals_the_blocks(n_rows: int, dtype: torch.dtype, name: str, monkeypatch) -> None:
    _, ours = pair(tiny_config())
    ours.to(dtype)
    ids, positions = token_ids(n_rows, 9, 131), torch.arange(9)[None]
    expected = ours(ids).logits[:, -1]
    prefer(name, monkeypatch)
    weights = engine.view_weights(ours)
    chosen = Products(weights, n_rows, products.MIN_STEPS)
    assert name in chosen.chosen.values()
    cache = engine.KVCache.allocate(ours, n_rows, 9)
    engine.prefill(ours, cache, ids[:, :8], None, positions[:, :8])
    logits = engine.decode_one_token(weights, cache, ids[:, 8], positions[:, 8], chosen)
    assert_same_within_rounding(logits, expected, n_ulps=64 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("name", ["2 slices", "packed"])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_generate_gives_transformers_tokens(name: str, options: dict[str, Any], monkeypatch) -> None:
    theirs, ours = pair(tiny_config())
    prefer(name, monkeypatch)
    used, call = set(), Products.__call__
    monkeypatch.setattr(Products, "__call__", lambda *args: used.update(args[0].chosen.values()) or call(*args))
    for n_rows in (1, 3) if not options else (1,):
        ids = token_ids(n_rows, 6, 131)
        assert ours.generate(ids, **LONG, **options).tolist() == theirs.generate(ids, **LONG).tolist()
    assert used == {name}


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [(10, "view"), (100, "copy")],
)
def test_a_copy_is_made_where_the_steps_earn_it(n_steps: int, expected: str) -> None:
    known = {"torch": Cost(0.0, 1.0, False), "view": Cost(0.0, 0.5, False), "copy": Cost(10.0, 0.1, True)}
    assert products.fastest(known, n_steps) == expected


def test_torch_keeps_what_gains_little() -> None:
    assert products.fastest({"torch": Cost(0.0, 1.0, False), "view": Cost(0.0, 0.95, False)}, 100) == "torch"
    assert products.fastest({"torch": Cost(0.0, 1.0, False), "view": Cost(0.0, 0.8, False)}, 100) == "view"


def test_copies_leave_half_of_the_free_memory(monkeypatch) -> None:
    _, ours = pair(tiny_config())
    weights = engine.view_weights(ours)
    prefer("packed", monkeypatch)
    everything = Products(weights, 2, products.MIN_STEPS)
    if "packed" not in everything.chosen.values():
        pytest.skip("this torch has no oneDNN")
    matrices = [matrix for same in products._by_shape(weights) for matrix in same]
    assert everything.n_bytes == sum(4 * matrix.shape.numel() for matrix in matrices)
    for share in (0.25, 0.4, 0.5):
        left = [int(2 * share * everything.n_bytes)]

        class Copied(products.Packed):
            """Takes its memory from what is left."""

            def __init__(self, *arguments: Any, left: list[int] = left):
                super().__init__(*arguments)
                if arguments[0].shape[0] > 16:  # not the trial of the dtype
                    left[0] -= self.n_bytes

        monkeypatch.setattr(products, "Packed", Copied)
        monkeypatch.setattr(
            products.psutil, "virtual_memory", lambda left=left: type("Memory", (), {"available": left[0]})
        )
        some = Products(weights, 2, products.MIN_STEPS)
        assert 0 < some.n_bytes < everything.n_bytes
        assert left[0] > 0
        assert {"packed", "as stored"} == set(some.chosen.values())


def test_ways_are_timed_once_a_process_and_for_long_calls_alone(monkeypatch) -> None:
    _, ours = pair(tiny_config(n_positions=80))
    monkeypatch.setattr(products, "_measured", {})
    timed, measure = [], products._measure
    monkeypatch.setattr(products, "_measure", lambda *call: timed.append(call) or measure(*call))
    for n_new, n_rows, n_timed in ((products.MIN_STEPS, 1, 0), (50, 1, 5), (60, 1, 5), (50, 2, 10), (50, 1, 10)):
        ours.generate(token_ids(n_rows, 3, 131), **LONG | {"max_new_tokens": n_new})
        assert len(timed) == n_timed, (n_new, n_rows)


def test_copies_live_as_long_as_their_call(monkeypatch) -> None:
    _, ours = pair(tiny_config())
    prefer("packed", monkeypatch)
    alive = []

    class Counted(products.Packed):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            alive.append(self)

        def __del__(self) -> None:
            gone.append(self.n_bytes)

    gone: list[int] = []
    monkeypatch.setattr(products, "Packed", Counted)
    ours.generate(token_ids(1, 3, 131), **LONG)
    n_made = len(alive)
    alive.clear()
    assert n_made > 0
    assert len(gone) == n_made


# --- half precision without instructions for it ---------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def slow_halves(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "is_slow", lambda dtype: dtype in HALVES)


def test_only_half_precision_is_ever_slow() -> None:
    assert not products.is_slow(torch.float32)
    assert not products.is_slow(torch.float64)
    for dtype in HALVES:  # oneDNN packs what the processor has instructions for
        is_packed = "packed" in products.ways(torch.ones(32, 32, dtype=dtype), 1)
        assert not (is_packed and products.is_slow(dtype))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_a_copy_in_float32_is_the_model_in_float32(dtype: torch.dtype, is_tied: bool, slow_halves: None) -> None:
    _, ours = pair(tiny_config(tie_word_embeddings=is_tied))
    ours.to(dtype)
    its_copy = decoding.in_fast_dtype(ours)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert (its_copy.lm_head.weight is its_copy.transformer.wte.weight) == is_tied
    ids = token_ids(2, 9, 131)
    assert torch.equal(its_copy(ids).logits, copy.deepcopy(ours).float()(ids).logits)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_generate_computes_in_float32(dtype: torch.dtype, options: dict[str, Any], slow_halves: None) -> None:
    theirs, ours = pair(tiny_config())
    theirs.to(dtype).float()
    ours.to(dtype)
    for n_new in (4, LONG["max_new_tokens"]):
        call = LONG | {"max_new_tokens": n_new, "return_dict_in_generate": True}
        expected = theirs.generate(token_ids(1, 6, 131), **call)
        found = ours.generate(token_ids(1, 6, 131), **call, **options)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.past_key_values.layers[0].keys.dtype == dtype
    assert ours.dtype == dtype


def test_the_copy_in_float32_is_that_of_the_first_token(slow_halves: None) -> None:
    _, ours = pair(tiny_config())
    ours.half()
    stream = ours.stream(token_ids(1, 6, 131), **LONG)
    with torch.no_grad():
        ours.transformer.h[0].mlp.c_fc.weight.mul_(3)
    expected = ours.generate(token_ids(1, 6, 131), **LONG)[:, 6:]
    assert torch.stack(list(stream), 1).tolist() == expected.tolist()


def test_without_the_memory_half_precision_stays(slow_halves: None, monkeypatch) -> None:
    _, ours = pair(tiny_config())
    n_bytes = 4 * ours.half().num_parameters()
    for available, is_copied in ((2 * n_bytes - 1, False), (2 * n_bytes, True)):
        free = type("Memory", (), {"available": available})
        monkeypatch.setattr(products.psutil, "virtual_memory", lambda free=free: free)
        assert (decoding.in_fast_dtype(ours) is not ours) == is_copied
