"""What the Triton causal_attention has beyond its reference: accuracy, memory, the bits of dropout, refusals."""

import math
from functools import partial

import fastgpt_kernels
import pytest
import torch
import triton.language as tl
from accuracy import assert_same_bits, gradients, random
from fastgpt_kernels import reference
from fastgpt_kernels.common import dropout
from fastgpt_kernels.operations.attention import op as attention
from fastgpt_kernels.operations.attention import packed
from fastgpt_kernels.operations.attention.op import causal_attention
from fastgpt_kernels.operations.attention.reference import split_heads
from interpreter import DEVICE, only_interpreted

from .formula import DTYPES, assert_attention_parity, make_inputs, make_mask, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("on_the_device")


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bug_float32_gradients_when_one_key_has_the_weight(head_dim: int, dropout_p: float) -> None:
    """Inputs of standard deviation 2: rowsum(out * dout) or a rounded log-sum-exp errs more than eager does."""
    q, k, v = (2 * x for x in make_inputs(1, 1, 65, 65, head_dim))
    assert_attention_parity(fastgpt_kernels, (q, k, v), dropout_p=dropout_p)


def test_a_wrong_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1, 1, 17, 17, 16, dtype=torch.bfloat16)
    assert_attention_parity(fastgpt_kernels, inputs)
    monkeypatch.setattr(attention, "LOG2_E", tl.constexpr(1.40))
    with pytest.raises(AssertionError, match="error"):
        assert_attention_parity(fastgpt_kernels, inputs)


@only_interpreted  # chips have no tiles for float64
@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_gradients_are_those_of_finite_differences(
    dropout_p: float, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "DTYPES", (torch.float64,))
    inputs = [x.requires_grad_() for x in make_inputs(1, 1, 3, 5, 2, dtype=torch.float64)]
    options = {"key_padding_mask": make_mask(mask, 1, 5), "dropout_p": dropout_p, "seed": 3, "scale": 0.3}
    assert torch.autograd.gradcheck(partial(causal_attention, **options), inputs)


# --- layouts --------------------------------------------------------------------------------------------------------


def test_what_is_returned_merges_its_heads_without_a_copy() -> None:
    inputs = make_inputs(2, 3, 9, 9, 16)
    for made in outputs_and_gradients(causal_attention, inputs):
        merged = made.transpose(1, 2).reshape(2, 9, 48)
        assert merged.data_ptr() == made.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_packed_heads_lie_in_one_tensor(dtype: torch.dtype) -> None:
    qkv = random(2, 19, 3, 2, 16).to(dtype).requires_grad_()
    dout = random(2, 2, 19, 16, seed=1).to(dtype)
    of_parts = torch.autograd.grad(causal_attention(*split_heads(qkv)), qkv, dout)[0]
    heads = packed.SplitHeads.apply(qkv)
    assert packed.are_packed(*heads)
    apart = torch.autograd.grad(causal_attention(*heads), heads, dout)
    assert packed.are_packed(*apart)
    whole = packed.SplitHeads.apply(qkv)
    joined = torch.autograd.grad(causal_attention(*whole), qkv, dout)[0]
    assert torch.equal(joined, of_parts)
    assert joined.is_contiguous()


def test_gradients_that_lie_apart_are_joined() -> None:
    qkv = random(2, 5, 3, 2, 16).requires_grad_()
    q, k, v = packed.SplitHeads.apply(qkv)
    expected = torch.autograd.grad(reference.causal_attention(*split_heads(qkv)).square().sum(), qkv)[0]
    assert torch.equal(torch.autograd.grad(reference.causal_attention(q, k, v).square().sum(), qkv)[0], expected)


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
    assert_same_bits(ours, expected)
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
