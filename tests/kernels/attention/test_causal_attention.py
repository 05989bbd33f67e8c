"""causal_attention, as reference and as kernel, against its formula and what others get wrong."""

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import (
    LAYOUTS,
    assert_as_accurate,
    assert_parity,
    assert_same_bits,
    gradients,
    max_error,
    random,
    relayout,
)
from fastgpt_kernels import reference
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .formula import (
    DTYPES,
    MASKS,
    assert_attention_parity,
    attention_formula,
    make_inputs,
    make_mask,
    outputs_and_gradients,
)

# (B, H, Tq, Tk, D), and the mask and the dropout they are tried with.
CASES = [
    ((2, 2, 1, 7, 16), "left", 0.25),
    ((1, 2, 2, 2, 64), "none", 0.25),
    ((2, 1, 17, 17, 64), "right", 0.0),
    ((1, 1, 64, 64, 80), "none", 0.25),
    ((2, 1, 65, 65, 64), "holes", 0.1),
    ((1, 1, 127, 127, 32), "none", 0.0),
    ((1, 1, 200, 200, 64), "left", 0.0),
    ((1, 1, 70, 131, 96), "none", 0.25),
    ((1, 1, 5, 131, 128), "right", 0.0),
    ((2, 1, 33, 40, 24), "all", 0.5),
    ((2, 1, 18, 29, 20), "holes", 0.0),
]


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "mask", "dropout_p"), CASES)
def test_as_accurate_as_eager(
    operations: Any, sizes: tuple[int, int, int, int, int], mask: str, dropout_p: float, dtype: torch.dtype
) -> None:
    inputs = make_inputs(*sizes, dtype=dtype)
    assert_attention_parity(operations, inputs, mask=make_mask(mask, sizes[0], sizes[3]), dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_sees_itself(operations: Any, dtype: torch.dtype) -> None:
    inputs, upstream = make_inputs(2, 3, 1, 1, 8, dtype=dtype), random(2, 3, 1, 8, seed=5).to(dtype)
    dq, dk, dv = gradients(operations.causal_attention, inputs, [upstream])
    # Not bit by bit: with fused multiply-adds the exponent of the only weight is a rounding error in place of 0.
    for found, expected in ((operations.causal_attention(*inputs), inputs[2]), (dv, upstream)):
        assert_as_accurate(found, expected, expected.double())
    for zero in (dq, dk):
        assert max_error(zero, torch.zeros_like(zero)) <= 16 * torch.finfo(dtype).eps


@cases(100)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 40), st.integers(1, 72)),
    n_past=st.integers(1, 40),
    mask=st.sampled_from(MASKS),
    scale=st.sampled_from([None, 0.0, 0.3, -1.0]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_arguments(
    operations: Any, sizes: tuple[int, int, int, int], n_past: int, mask: str, scale: float | None, dropout_p: float,
    dtype: torch.dtype, layout: str,
) -> None:  # fmt: skip
    n_batch, n_heads, n_queries, head_dim = sizes
    inputs = make_inputs(n_batch, n_heads, n_queries, n_queries + n_past, head_dim, dtype=dtype, layout=layout)
    upstream = relayout(random(*inputs[0].shape, seed=5).to(dtype), layout)
    padding = make_mask(mask, n_batch, n_queries + n_past)
    # Where one key has all the weight, the gradient of the scores is what remains of terms that cancel.
    assert_attention_parity(
        operations, inputs, upstream, mask=padding, scale=scale, dropout_p=dropout_p, slack=4, terms_cancel=True
    )


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
@pytest.mark.parametrize("n_queries", [1, 16, 70])
def test_queries_sit_at_the_end_of_the_keys(operations: Any, n_queries: int, mask: str) -> None:
    q, k, v = make_inputs(2, 1, 71, 71, 16)
    attention = partial(operations.causal_attention, key_padding_mask=make_mask(mask, 2, 71))
    torch.testing.assert_close(attention(q[:, :, -n_queries:], k, v), attention(q, k, v)[:, :, -n_queries:])


@pytest.mark.parametrize("mask", ["none", "left"])
def test_later_keys_change_nothing(operations: Any, mask: str) -> None:
    q, k, v = make_inputs(2, 2, 12, 12, 8)
    attention = partial(operations.causal_attention, key_padding_mask=make_mask(mask, 2, 12))
    before = attention(q, k, v)
    k[:, :, 7:], v[:, :, 7:] = 5.0, -9.0
    after = attention(q, k, v)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.isclose(before[0, :, 7:], after[0, :, 7:]).all(-1).any()


@pytest.mark.parametrize("mask", ["none", "right"])
def test_huge_scores_stay_finite(operations: Any, mask: str) -> None:
    """exp of a score overflows where the row's largest is not subtracted first."""
    q, k, v = make_inputs(1, 2, 9, 9, 16)
    options = {"scale": 1e4, "key_padding_mask": make_mask(mask, 1, 9)}
    exact = attention_formula(q.double(), k.double(), v.double(), **options)
    assert max_error(operations.causal_attention(q, k, v, **options), exact) < 1e-2


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "left"])
def test_packed_qkv_is_read_in_place(operations: Any, mask: str, dtype: torch.dtype) -> None:
    packed, padding = random(2, 9, 3 * 4 * 16).to(dtype), make_mask(mask, 2, 9)

    def attend(attention: Any, packed: Tensor) -> Tensor:
        q, k, v = packed.view(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, key_padding_mask=padding).transpose(1, 2).reshape(2, 9, 64)

    functions = partial(attend, operations.causal_attention), partial(attend, attention_formula)
    assert_parity(*functions, [packed], slack=2 if operations is reference else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_bug_strided_upstream_gradient(operations: Any, mask: str, layout: str) -> None:
    inputs = make_inputs(2, 2, 5, 7, 16, layout=layout)
    upstream = relayout(random(2, 2, 5, 16, seed=5).float(), layout)
    assert_attention_parity(operations, inputs, upstream, mask=make_mask(mask, 2, 7))


def test_mask_of_any_strides(operations: Any) -> None:
    inputs, mask = make_inputs(3, 1, 5, 9, 16), make_mask("holes", 3, 9)
    assert mask is not None
    attention = operations.causal_attention
    expected = attention(*inputs, key_padding_mask=mask)
    assert torch.equal(attention(*inputs, key_padding_mask=relayout(mask.int(), "transposed").bool()), expected)
    wide = torch.zeros(3, 18, dtype=torch.bool)
    wide[:, ::2] = mask
    assert torch.equal(attention(*inputs, key_padding_mask=wide[:, ::2]), expected)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "message"),
    [
        ((2, 2, 4), (2, 2, 4), (2, 2, 4), None, r"\(2, 2, 4\)"),
        ((2, 2, 4, 8), (2, 2, 5, 8), (2, 2, 4, 8), None, r"\(2, 2, 5, 8\), \(2, 2, 4, 8\)"),
        ((2, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), None, r"\(2, 2, 4, 8\), \(1, 2, 4, 8\)"),
        ((2, 4, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8), None, r"\(2, 4, 4, 8\), \(2, 2, 4, 8\)"),
        ((2, 2, 4, 8), (2, 2, 4, 9), (2, 2, 4, 9), None, r"\(2, 2, 4, 8\), \(2, 2, 4, 9\)"),
        ((2, 2, 5, 8), (2, 2, 4, 8), (2, 2, 4, 8), None, "5 queries .* 4 keys"),
        ((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8), ((2, 5), torch.bool), r"\(2, 4\), not .* \(2, 5\)"),
        (
            (2, 2, 4, 8),
            (2, 2, 4, 8),
            (2, 2, 4, 8),
            ((2, 1, 1, 4), torch.bool),
            r"\(2, 4\), not .* \(2, 1, 1, 4\)",
        ),
        ((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8), ((2, 4), torch.float32), "must be bool .* not torch.float32"),
    ],
)
def test_wrong_shapes_are_named(
    operations: Any,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    mask: tuple[tuple[int, ...], torch.dtype] | None,
    message: str,
) -> None:
    padding = None if mask is None else torch.ones(mask[0], dtype=mask[1])
    with pytest.raises(ValueError, match=f"causal_attention: .*{message}"):
        operations.causal_attention(*map(torch.zeros, (q, k, v)), key_padding_mask=padding)


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bug_fully_masked_row_gives_nan(operations: Any, dropout_p: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 1, 6, 6, 8, dtype=dtype)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0], mask[1, :4] = False, False  # nothing to see in sequence 0, nor for the first four queries of sequence 1
    attention = partial(operations.causal_attention, key_padding_mask=mask, dropout_p=dropout_p, seed=3)
    attended, dq, dk, dv = outputs_and_gradients(attention, inputs)
    for zero in (attended[0], attended[1, :, :4], dq[0], dk[0], dv[0], dq[1, :, :4], dk[1, :, :4], dv[1, :, :4]):
        assert torch.equal(zero, torch.zeros_like(zero))
    for tensor in (attended, dq, dk, dv):
        assert tensor.isfinite().all()
        assert (tensor[2] != 0).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["left", "right", "holes", "all"])
def test_bug_nan_at_masked_keys_leaks(operations: Any, kind: str, dropout_p: float, poison: float) -> None:
    q, k, v = make_inputs(1, 1, 67, 69, 8) if kind == "holes" else make_inputs(2, 1, 7, 9, 8)
    mask = make_mask(kind, k.shape[0], k.shape[2])
    assert mask is not None
    hidden = ~mask[:, None, :, None]
    attention = partial(operations.causal_attention, key_padding_mask=mask, dropout_p=dropout_p, seed=3)
    clean = outputs_and_gradients(attention, (q, k, v))
    poisoned = outputs_and_gradients(attention, (q, k.masked_fill(hidden, poison), v.masked_fill(hidden, poison)))
    assert_same_bits(poisoned, clean)
    for grad in clean[2:]:
        assert torch.equal(grad * hidden, torch.zeros_like(grad))


@pytest.mark.parametrize("side", ["left", "right"])
def test_bug_padded_batch_differs_from_single_sequences(operations: Any, side: str) -> None:
    lengths, n_tokens = [3, 11, 1, 8], 11
    rows = [slice(n_tokens - n, n_tokens) if side == "left" else slice(0, n) for n in lengths]
    q, k, v = make_inputs(4, 2, n_tokens, n_tokens, 16)
    mask = torch.zeros(4, n_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, row] = True
    batch = operations.causal_attention(q, k, v, key_padding_mask=mask)
    for i, row in enumerate(rows):
        single = operations.causal_attention(*(x[i : i + 1, :, row] for x in (q, k, v)))
        torch.testing.assert_close(batch[i : i + 1, :, row], single)


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("n_queries", [1, 4, 6])
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 0.02, -0.5])
def test_bug_scale_is_ignored(operations: Any, scale: float | None, n_queries: int, mask: str) -> None:
    inputs = make_inputs(2, 1, n_queries, 6, 8)
    assert_attention_parity(operations, inputs, mask=make_mask(mask, 2, 6), scale=scale, slack=4)


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bug_results_differ_between_runs(operations: Any, dropout_p: float, mask: str) -> None:
    inputs, padding = make_inputs(2, 1, 35, 35, 16), make_mask(mask, 2, 35)
    attention = partial(operations.causal_attention, key_padding_mask=padding, dropout_p=dropout_p, seed=11)
    first = outputs_and_gradients(attention, inputs)
    for _ in range(3):
        again = outputs_and_gradients(attention, inputs)
        assert_same_bits(first, again)


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bug_autocast_mixes_dtypes(operations: Any, dropout_p: float, mask: str) -> None:
    q, k, v = make_inputs(2, 2, 6, 6, 16)
    options = {"key_padding_mask": make_mask(mask, 2, 6), "dropout_p": dropout_p, "seed": 3}
    expected = operations.causal_attention(q, k, v, **options)
    # A query straight from a product in bfloat16, keys from a cache in float32.
    with torch.autocast(q.device.type, torch.bfloat16):
        attended = operations.causal_attention(q.bfloat16(), k, v, **options)
    assert attended.dtype == torch.bfloat16
    assert max_error(attended, expected) < 0.05


# --- the reference alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n_keys", [7, 129])
def test_reference_in_float64(n_keys: int, mask: str) -> None:
    inputs = make_inputs(2, 1, min(n_keys, 33), n_keys, 20, dtype=torch.float64)
    assert_attention_parity(reference, inputs, mask=make_mask(mask, 2, n_keys))


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("n_keys", [1, 6, 9])
def test_reference_gradients_are_those_of_finite_differences(n_keys: int, mask: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 2, min(n_keys, 6), n_keys, 3, dtype=torch.float64)]
    attention = partial(reference.causal_attention, key_padding_mask=make_mask(mask, 2, n_keys))
    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("mask", ["none", "right"])
def test_bug_more_heads_than_a_grid_axis_holds(mask: str) -> None:
    """The kernels are tried on more in `record.py`; the interpreter would take minutes for so many programs."""
    inputs, padding = make_inputs(257, 256, 2, 3, 4), make_mask(mask, 257, 3)
    expected = attention_formula(*inputs, key_padding_mask=padding)
    assert max_error(reference.causal_attention(*inputs, key_padding_mask=padding), expected) < 1e-5


def test_bug_graph_breaks_when_lengths_vary() -> None:
    torch.compiler.reset()
    compiled = torch.compile(reference.causal_attention, backend="eager", fullgraph=True, dynamic=True)
    for n_tokens in (5, 9):
        inputs = make_inputs(2, 2, n_tokens, n_tokens, 8)
        torch.testing.assert_close(compiled(*inputs), reference.causal_attention(*inputs))
