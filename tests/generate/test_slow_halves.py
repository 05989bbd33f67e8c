"""Half precision on a CPU that lacks instructions for it: generation computes in float32."""

import copy
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from fastgpt_kernels.operations.decode_step.reference import multiply
from models import pair, tiny_config, token_ids

import fastgpt
from fastgpt import generate as engine
from fastgpt.generate import decoding, products
from fastgpt.generate.implementations import implementations_of
from fastgpt.generate.products import Products

pytestmark = pytest.mark.usefixtures("in_torch")

LONG = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": products.MIN_STEPS + 8}
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def slow_halves(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "is_slow", lambda dtype: dtype in HALVES)


def test_only_half_precision_is_ever_slow() -> None:
    assert not products.is_slow(torch.float32)
    assert not products.is_slow(torch.float64)
    for dtype in HALVES:  # oneDNN packs what the processor has instructions for
        is_packed = "packed" in implementations_of(torch.ones(32, 32, dtype=dtype), 1)
        assert not (is_packed and products.is_slow(dtype))


@pytest.mark.parametrize(("times", "expected"), [([700.0, 3.0], False), ([50.0] * 5, True)])
def test_bug_a_busy_core_was_taken_for_one_without_instructions(times, expected, monkeypatch) -> None:
    turns = iter(times)
    monkeypatch.setattr(products, "_slowness", lambda dtype: next(turns))
    assert products.is_slow.__wrapped__(torch.bfloat16) == expected


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
        monkeypatch.setattr(products, "available_memory", lambda available=available: available)
        assert (decoding.in_fast_dtype(ours) is not ours) == is_copied


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
