"""The Triton causal_attention against its formula and against the reference."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import triton.language as tl
from accuracy import LAYOUTS, assert_parity, forward, gradients, max_error, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.common import dropout
from fastgpt_kernels.operations.attention import op as attention
from fastgpt_kernels.operations.attention.op import causal_attention
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE
from torch import Tensor

from .test_causal_attention import MASKS, attention_formula, make_inputs, make_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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
]


def dropped_formula(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float | None, dropout_p: float, seed: int
) -> Tensor:
    """`attention_formula` with the weights that `dropout.dropout_keep_mask` drops set to zero."""
    if dropout_p == 0.0:
        return attention_formula(q, k, v, scale=scale, key_padding_mask=mask)
    n_keys = k.shape[2]
    identity = torch.eye(n_keys, dtype=q.dtype).expand(*q.shape[:2], n_keys, n_keys)
    weights = attention_formula(q, k, identity, scale=scale, key_padding_mask=mask)
    keep, keep_scale = dropout.dropout_keep_mask((*q.shape[:3], n_keys), dropout_p, seed, q.device)  # pyright: ignore
    return torch.einsum("bhqk,bhkd->bhqd", weights * keep * keep_scale, v)


def assert_attention_parity(
    inputs: tuple[Tensor, ...],
    upstream: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    slack: float = 1.0,
    terms_cancel: bool = False,
) -> None:
    kernel = partial(causal_attention, key_padding_mask=mask, scale=scale, dropout_p=dropout_p, seed=3)
    formula = partial(dropped_formula, mask=mask, scale=scale, dropout_p=dropout_p, seed=3)
    grads = None if upstream is None else [upstream]
    assert_parity(kernel, formula, inputs, grads, slack=slack, terms_cancel=terms_cancel)


def outputs_and_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    upstream = random(*inputs[0].shape, seed=5).to(inputs[0])
    return *forward(function, inputs), *gradients(function, inputs, [upstream])


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "mask", "dropout_p"), CASES)
def test_as_accurate_as_eager(
    sizes: tuple[int, int, int, int, int], mask: str, dropout_p: float, dtype: torch.dtype
) -> None:
    inputs = make_inputs(*sizes, dtype=dtype)
    assert_attention_parity(inputs, mask=make_mask(mask, sizes[0], sizes[3]), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bug_float32_gradients_when_one_key_has_the_weight(head_dim: int, dropout_p: float) -> None:
    """Inputs of standard deviation 2: rowsum(out * dout) or a rounded log-sum-exp errs more than eager does."""
    q, k, v = (2 * x for x in make_inputs(1, 1, 65, 65, head_dim))
    assert_attention_parity((q, k, v), dropout_p=dropout_p)


def test_a_wrong_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1, 1, 17, 17, 16, dtype=torch.bfloat16)
    assert_attention_parity(inputs)
    monkeypatch.setattr(attention, "LOG2_E", tl.constexpr(1.40))
    with pytest.raises(AssertionError, match="error"):
        assert_attention_parity(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_sees_itself(dtype: torch.dtype) -> None:
    inputs, upstream = make_inputs(2, 3, 1, 1, 8, dtype=dtype), random(2, 3, 1, 8, seed=5).to(dtype)
    assert torch.equal(causal_attention(*inputs), inputs[2])
    dq, dk, dv = gradients(causal_attention, inputs, [upstream])
    assert torch.equal(dv, upstream)
    for zero in (dq, dk):
        assert max_error(zero, torch.zeros_like(zero)) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_gradients_are_those_of_finite_differences(
    dropout_p: float, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "DTYPES", (torch.float64,))
    inputs = [x.requires_grad_() for x in make_inputs(1, 1, 3, 5, 2, dtype=torch.float64)]
    options = {"key_padding_mask": make_mask(mask, 1, 5), "dropout_p": dropout_p, "seed": 3, "scale": 0.3}
    assert torch.autograd.gradcheck(partial(causal_attention, **options), inputs)


@cases(140)
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
    sizes: tuple[int, int, int, int],
    n_past: int,
    mask: str,
    scale: float | None,
    dropout_p: float,
    dtype: torch.dtype,
    layout: str,
) -> None:
    n_batch, n_heads, n_queries, head_dim = sizes
    inputs = make_inputs(n_batch, n_heads, n_queries, n_queries + n_past, head_dim, dtype=dtype, layout=layout)
    upstream = relayout(random(*inputs[0].shape, seed=5).to(dtype), layout)
    padding = make_mask(mask, n_batch, n_queries + n_past)
    # Where one key has all the weight, the gradient of the scores is what remains of terms that cancel.
    assert_attention_parity(
        inputs, upstream, mask=padding, scale=scale, dropout_p=dropout_p, slack=4, terms_cancel=True
    )


@pytest.mark.parametrize("mask", ["none", "right"])
def test_huge_scores_stay_finite(mask: str) -> None:
    q, k, v = make_inputs(1, 2, 9, 9, 16)
    options = {"scale": 1e4, "key_padding_mask": make_mask(mask, 1, 9)}
    exact = attention_formula(q.double(), k.double(), v.double(), **options)
    assert max_error(causal_attention(q, k, v, **options), exact) < 1e-2


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_qkv_is_read_in_place(dtype: torch.dtype) -> None:
    packed = random(2, 9, 3 * 4 * 16).to(dtype)

    def attend(function: Callable[..., Tensor], packed: Tensor) -> Tensor:
        q, k, v = packed.view(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return function(q, k, v).transpose(1, 2).reshape(2, 9, 64)

    assert_parity(partial(attend, causal_attention), partial(attend, attention_formula), [packed])


def test_what_is_returned_merges_its_heads_without_a_copy() -> None:
    inputs = make_inputs(2, 3, 9, 9, 16)
    for made in outputs_and_gradients(causal_attention, inputs):
        merged = made.transpose(1, 2).reshape(2, 9, 48)
        assert merged.data_ptr() == made.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bug_strided_upstream_gradient(layout: str) -> None:
    inputs = make_inputs(2, 2, 5, 7, 16, layout=layout)
    assert_attention_parity(inputs, relayout(random(2, 2, 5, 16, seed=5).float(), layout))


def test_mask_of_any_strides() -> None:
    inputs, mask = make_inputs(3, 1, 5, 9, 16), make_mask("holes", 3, 9)
    assert mask is not None
    expected = causal_attention(*inputs, key_padding_mask=mask)
    assert torch.equal(causal_attention(*inputs, key_padding_mask=relayout(mask.int(), "transposed").bool()), expected)
    wide = torch.zeros(3, 18, dtype=torch.bool)
    wide[:, ::2] = mask
    assert torch.equal(causal_attention(*inputs, key_padding_mask=wide[:, ::2]), expected)


@pytest.mark.parametrize("n_queries", [1, 16, 70])
def test_queries_sit_at_the_end_of_the_keys(n_queries: int) -> None:
    q, k, v = make_inputs(1, 1, 71, 71, 16)
    full = causal_attention(q, k, v)
    torch.testing.assert_close(causal_attention(q[:, :, -n_queries:], k, v), full[:, :, -n_queries:])


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bug_fully_masked_row_gives_nan(dropout_p: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 1, 6, 6, 8, dtype=dtype)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0], mask[1, :4] = False, False  # nothing to see in sequence 0, nor for the first four queries of sequence 1
    attend = partial(causal_attention, key_padding_mask=mask, dropout_p=dropout_p, seed=3)
    attended, dq, dk, dv = outputs_and_gradients(attend, inputs)
    for zero in (attended[0], attended[1, :, :4], dq[0], dk[0], dv[0], dq[1, :, :4], dk[1, :, :4], dv[1, :, :4]):
        assert torch.equal(zero, torch.zeros_like(zero))
    for tensor in (attended, dq, dk, dv):
        assert tensor.isfinite().all()
        assert (tensor[2] != 0).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["left", "holes", "all"])
def test_bug_nan_at_masked_keys_leaks(kind: str, dropout_p: float, poison: float) -> None:
    q, k, v = make_inputs(1, 1, 67, 69, 8) if kind == "holes" else make_inputs(2, 1, 7, 9, 8)
    mask = make_mask(kind, k.shape[0], k.shape[2])
    assert mask is not None
    hidden = ~mask[:, None, :, None]
    attend = partial(causal_attention, key_padding_mask=mask, dropout_p=dropout_p, seed=3)
    clean = outputs_and_gradients(attend, (q, k, v))
    poisoned = outputs_and_gradients(attend, (q, k.masked_fill(hidden, poison), v.masked_fill(hidden, poison)))
    assert all(torch.equal(ours, expected) for ours, expected in zip(poisoned, clean, strict=True))
    for grad in clean[2:]:
        assert torch.equal(grad * hidden, torch.zeros_like(grad))


@pytest.mark.parametrize("side", ["left", "right"])
def test_bug_padded_batch_differs_from_single_sequences(side: str) -> None:
    lengths, n_tokens = [3, 11, 1], 11
    rows = [slice(n_tokens - n, n_tokens) if side == "left" else slice(0, n) for n in lengths]
    q, k, v = make_inputs(3, 2, n_tokens, n_tokens, 16)
    mask = torch.zeros(3, n_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, row] = True
    batch = causal_attention(q, k, v, key_padding_mask=mask)
    for i, row in enumerate(rows):
        single = causal_attention(*(x[i : i + 1, :, row] for x in (q, k, v)))
        torch.testing.assert_close(batch[i : i + 1, :, row], single)


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "dtype"), list(zip([0, -1, 0x0123456789ABCDEF], DTYPES, strict=True)))
def test_dropout_drops_the_bits_of_the_reference(seed: int, dtype: torch.dtype) -> None:
    """Equal scores and values that are unit vectors make the output the pattern of the kept weights."""
    n_queries, n_keys = 83, 101
    q, k = torch.zeros(2, 1, n_queries, n_keys, dtype=dtype), torch.zeros(2, 1, n_keys, n_keys, dtype=dtype)
    v = torch.eye(n_keys, dtype=dtype).expand(2, 1, n_keys, n_keys)
    keep, _ = dropout.dropout_keep_mask((2, 1, n_queries, n_keys), 0.4, seed, DEVICE)
    expected = keep.tril(n_keys - n_queries)
    attend = partial(causal_attention, dropout_p=0.4, seed=seed)
    assert torch.equal(attend(q, k, v) != 0, expected)
    upstream = torch.eye(n_queries, n_keys, dtype=dtype).expand(2, 1, n_queries, n_keys)
    _, _, dv = gradients(attend, (q, k, v), [upstream])
    assert torch.equal(dv[..., :n_queries] != 0, expected.mT)


def test_a_draw_at_the_threshold_is_kept() -> None:
    """Found by bisection: the largest threshold at which the first weight survives is its draw."""
    n, seed = 16, 3
    kept, dropped = 0, 65536
    while dropped - kept > 1:
        middle = (kept + dropped) // 2
        keep, _ = dropout.dropout_keep_mask((1, 1, n, n), middle / 65536, seed, DEVICE)
        kept, dropped = (middle, dropped) if keep[0, 0, 0, 0] else (kept, middle)
    assert 0 < kept < 65535
    q, v = torch.zeros(1, 1, n, n), torch.eye(n).expand(1, 1, n, n)
    assert causal_attention(q, q, v, dropout_p=kept / 65536, seed=seed)[0, 0, 0, 0] != 0
    assert causal_attention(q, q, v, dropout_p=dropped / 65536, seed=seed)[0, 0, 0, 0] == 0


def test_seed_from_torchs_generator() -> None:
    inputs = make_inputs(1, 2, 16, 16, 16)
    torch.manual_seed(5)
    ours = causal_attention(*inputs, dropout_p=0.5)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, reference.causal_attention(*inputs, dropout_p=0.5))
    assert not torch.equal(ours, causal_attention(*inputs, dropout_p=0.5))


def test_seed_may_advance_before_the_backward_pass() -> None:
    inputs, seed = make_inputs(1, 1, 16, 16, 16), torch.tensor(4)
    q, k, v = (x.requires_grad_() for x in inputs)
    attended = causal_attention(q, k, v, dropout_p=0.5, seed=seed)
    seed += 1  # as a captured graph advances its seed between replays
    ours = torch.autograd.grad(attended.sum(), (q, k, v))
    expected = gradients(partial(causal_attention, dropout_p=0.5, seed=4), inputs, [torch.ones_like(attended)])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not torch.equal(attended, causal_attention(q, k, v, dropout_p=0.5, seed=seed))


@pytest.mark.parametrize("dropout_p", [1e-9, 0.99999, math.nextafter(1.0, 0.0)])
def test_dropout_of_nearly_nothing_and_nearly_everything(dropout_p: float) -> None:
    inputs = make_inputs(1, 1, 33, 33, 16)
    options = {"dropout_p": dropout_p, "seed": 3}
    ours = outputs_and_gradients(partial(causal_attention, **options), inputs)
    expected = outputs_and_gradients(partial(reference.causal_attention, **options), inputs)
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item()))


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 16), (torch.float32, 129)])
def test_no_kernel_for(dtype: torch.dtype, head_dim: int) -> None:
    inputs = make_inputs(1, 1, 2, 2, head_dim, dtype=dtype)
    assert not attention.supports(inputs[0])
    with pytest.raises(ValueError, match=f"no kernel for {dtype} with heads of {head_dim}"):
        causal_attention(*inputs)


def test_wrong_arguments_are_named() -> None:
    q, k, v = make_inputs(1, 1, 5, 5, 16)
    with pytest.raises(ValueError, match=r"must share one dtype, not torch.bfloat16, torch.float32, torch.float32"):
        causal_attention(q.bfloat16(), k, v)
    with pytest.raises(ValueError, match=r"5 queries .* 4 keys"):
        causal_attention(q, k[:, :, :4], v[:, :, :4])
    with pytest.raises(ValueError, match="dropout_p must be"):
        causal_attention(q, k, v, dropout_p=1.0)
    with pytest.raises(ValueError, match="dropout seed must"):
        causal_attention(q, k, v, dropout_p=0.1, seed=2**64)


def test_bug_autocast_mixes_dtypes() -> None:
    q, k, v = make_inputs(2, 2, 6, 6, 16)
    expected = reference.causal_attention(q, k, v)
    with torch.autocast(DEVICE, torch.bfloat16):
        attended = causal_attention(q.bfloat16(), k, v)
    assert attended.dtype == torch.bfloat16
    assert max_error(attended, expected) < 0.05
