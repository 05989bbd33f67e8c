"""The products of decode steps on a CPU: every implementation gives the product, and a call takes the cheapest."""

import itertools
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, drawn_again, max_error
from chosen_products import assert_step_equals_blocks, exact, prefer
from fastgpt_kernels.operations.decode_step.reference import multiply
from models import pair, tiny_config, token_ids

from fastgpt import generate as engine
from fastgpt.generate import implementations, products
from fastgpt.generate.implementations import implementations_of
from fastgpt.generate.products import Cost, Products

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LONG = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": products.MIN_STEPS + 8}

pytestmark = pytest.mark.usefixtures("in_torch")

# --- each implementation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 5, 33])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [(64, 48), (96, 131), (50, 64)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_every_implementation_gives_the_product(
    n_inputs: int, n_outputs: int, by_columns: bool, n_rows: int, dtype: torch.dtype
) -> None:
    """Beside the product in float64, with a row that is larger than the others, and with and without a bias."""
    generator = torch.Generator().manual_seed(n_rows)
    matrix = torch.randn(n_inputs, n_outputs, generator=generator).to(dtype)
    matrix = matrix.t().contiguous().t() if by_columns else matrix
    x, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n_rows, n_inputs), (n_outputs,)))
    x[0] *= 8
    found = implementations_of(matrix, n_rows)
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
        for implementation in found.values():
            assert_as_accurate(implementation(matrix)(x, added), eager, true, eager_error=eager_error)


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_onednn_packs_what_the_processor_multiplies(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no instructions for bfloat16")
    assert "packed" in implementations_of(torch.randn(32, 48).to(dtype), n_rows=1)


def test_a_type_that_onednn_refuses_is_not_packed() -> None:
    assert "packed" not in implementations_of(torch.randn(32, 48, dtype=torch.float64), n_rows=1)


def test_a_product_that_adds_in_half_precision_is_not_packed(monkeypatch) -> None:
    """As oneDNN's of float16 does on ARM: it errs 7 times as much as torch's for 96 inputs, and 37 times for 3072."""

    def added_in_its_dtype(packed: implementations.Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        parts = zip(x.split(1, dim=1), stored[id(packed)].split(1), strict=True)
        return sum((rows @ part for rows, part in parts), torch.zeros((), dtype=x.dtype))

    stored: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(
        implementations.Packed, "__init__", lambda packed, matrix, n: stored.update({id(packed): matrix})
    )
    monkeypatch.setattr(implementations.Packed, "__call__", added_in_its_dtype)
    implementations.packs.cache_clear()
    try:
        assert not implementations.packs(torch.float16)
        assert not implementations.packs(torch.bfloat16)
        assert implementations.packs(torch.float32)
        assert list(implementations_of(torch.randn(32, 48).half(), n_rows=2)) == ["as stored"]
    finally:
        implementations.packs.cache_clear()


def test_slices_read_the_weights_where_they_lie() -> None:
    """A view sees a change of the weights, and takes no memory; a copy says how large it is."""
    for dtype in (torch.float32, torch.bfloat16):
        for matrix in (torch.randn(32, 48).to(dtype), torch.randn(48, 32).to(dtype).t()):
            copies = {"packed"} if matrix.t().is_contiguous() else {"packed", "dot products"}
            for name, implementation in implementations_of(matrix, 1).items():
                prepared, x = implementation(matrix), torch.ones(1, 32, dtype=dtype)
                assert prepared.n_bytes == (matrix.nbytes if name in copies else 0)
                before = prepared(x, None)
                with torch.no_grad():
                    matrix += 1
                assert torch.allclose(prepared(x, None), before) == (name in copies)


NAMES = "as stored", "transposed", "2 slices", "4 slices", "packed"


@pytest.mark.parametrize(
    ("n_rows", "dtype", "name"),
    [*itertools.product((1, 2, 8), (torch.float32, torch.bfloat16), NAMES), (1, torch.bfloat16, "dot products")],
    ids=str,
)
def test_a_decode_step_equals_the_blocks(n_rows: int, dtype: torch.dtype, name: str, monkeypatch) -> None:
    if name == "packed" and not implementations.packs(dtype):
        pytest.skip(f"oneDNN does not multiply {dtype} on this processor")
    assert_step_equals_blocks(pair(tiny_config())[1].to(dtype), n_rows, name, monkeypatch)


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


@pytest.mark.parametrize("name", ["transposed", "4 slices", "packed"])
def test_bug_one_layer_stored_in_another_way_raised_key_error(name: str, monkeypatch) -> None:
    """What the first layer's matrix could be multiplied by was taken for the others', too."""
    theirs, ours = pair(tiny_config(n_layer=3))
    for model in (theirs, ours):
        first, second, _ = (block.mlp.c_fc.weight for block in model.transformer.h)
        first.data = first.data.t().contiguous().t()
        second.data = torch.stack((second.data, second.data), -1)[..., 0]
    for matrices in products._by_kind(engine.view_weights(ours)):  # each is timed for how it is stored
        assert len({matrix.stride() for matrix in matrices}) == 1  # type: ignore[union-attr]
    prefer(name, monkeypatch)
    ids = token_ids(1, 6, 131)
    assert ours.generate(ids, **LONG).tolist() == theirs.generate(ids, **LONG).tolist()


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


@needs_onednn
def test_copies_leave_half_of_the_free_memory(monkeypatch) -> None:
    _, ours = pair(tiny_config())
    weights = engine.view_weights(ours)
    prefer("packed", monkeypatch)
    everything = Products(weights, 2, products.MIN_STEPS)
    matrices = [matrix for same in products._by_kind(weights) for matrix in same]
    assert everything.n_bytes == sum(4 * matrix.shape.numel() for matrix in matrices)
    for share in (0.25, 0.4, 0.5):
        left = [int(2 * share * everything.n_bytes)]

        class Copied(implementations.Packed):
            """Takes its memory from what is left."""

            def __init__(self, *arguments: Any, left: list[int] = left):
                super().__init__(*arguments)
                if arguments[0].shape[0] > 16:  # not the trial of the dtype
                    left[0] -= self.n_bytes

        monkeypatch.setattr(implementations, "Packed", Copied)
        monkeypatch.setattr(products, "available_memory", lambda left=left: left[0])
        some = Products(weights, 2, products.MIN_STEPS)
        assert 0 < some.n_bytes < everything.n_bytes
        assert left[0] > 0
        assert {"packed", "as stored"} == set(some.chosen.values())


def test_implementations_are_timed_once_a_process_and_for_long_calls_alone(monkeypatch) -> None:
    _, ours = pair(tiny_config(n_positions=80))
    monkeypatch.setattr(products, "_measured", {})
    timed, measure = [], products._measure
    monkeypatch.setattr(products, "_measure", lambda *call: timed.append(call) or measure(*call))
    for n_new, n_rows, n_timed in ((products.MIN_STEPS, 1, 0), (50, 1, 5), (60, 1, 5), (50, 2, 10), (50, 1, 10)):
        ours.generate(token_ids(n_rows, 3, 131), **LONG | {"max_new_tokens": n_new})
        assert len(timed) == n_timed, (n_new, n_rows)


def test_bug_each_was_timed_on_a_matrix_that_the_one_before_had_brought_into_the_caches(monkeypatch) -> None:
    """In a step it is always another matrix."""
    matrices = [torch.randn(8, 16) for _ in range(12)]
    read: list[int] = []

    class Noted(implementations.AsStored):
        def __call__(self, x, bias):
            read.append(next(index for index, matrix in enumerate(matrices) if matrix is self.matrix))
            return super().__call__(x, bias)

    monkeypatch.setattr(products, "implementations_of", lambda *_: dict.fromkeys(("one", "two", "three"), Noted))
    assert products._measure(matrices, 1, None).keys() == {"one", "two", "three"}
    assert len(set(read)) == 12
    for index in range(4, len(read)):
        assert read[index] not in read[index - 4 : index]
