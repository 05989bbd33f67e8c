"""causal_attention against its formula; its dropout has a file of its own."""

from functools import partial

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_parity, gradients, max_error, random, relayout
from fastgpt_kernels import reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

MASKS = ["none", "left", "right", "holes", "all"]


def attention_formula(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    query_position = torch.arange(n_queries)[:, None] + n_keys - n_queries
    visible = (torch.arange(n_keys) <= query_position).expand(q.shape[0], 1, n_queries, n_keys)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
        k, v = (torch.where(key_padding_mask[:, None, :, None], t, 0.0) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    highest = (
        torch.where(visible, scores, -torch.inf).amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min).detach()
    )
    exponentials = torch.where(visible, (torch.where(visible, scores, highest) - highest).exp(), 0.0)
    weights = exponentials / exponentials.sum(-1, keepdim=True).clamp(min=0.5)  # at least 1 where a key is seen
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def make_inputs(
    n_batch: int,
    n_heads: int,
    n_queries: int,
    n_keys: int,
    head_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    lengths = (n_queries, n_keys, n_keys)
    tensors = [random(n_batch, n_heads, n, head_size, seed=seed) for seed, n in enumerate(lengths)]
    q, k, v = (relayout(x.to(dtype), layout) for x in tensors)
    return q, k, v


def make_mask(kind: str, n_batch: int, n_keys: int) -> Tensor | None:
    """(B, Tk), True = attend. In every kind but "all" each sequence has something to attend to."""
    if kind == "none":
        return None
    position = torch.arange(n_keys).expand(n_batch, n_keys)
    n_hidden = (torch.arange(n_batch)[:, None] + 1) * n_keys // (n_batch + 1)
    if kind == "left":
        return position >= n_hidden
    if kind == "right":
        return position < n_keys - n_hidden
    if kind == "holes":
        return (position * 7 + torch.arange(n_batch)[:, None]) % 3 != 1
    return torch.zeros(n_batch, n_keys, dtype=torch.bool)


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 2, 1),
        (2, 3, 1, 7, 16),
        (1, 2, 17, 17, 64),
        (2, 1, 129, 129, 20),
        (2, 2, 5, 131, 32),
        (1, 1, 64, 65, 80),
    ],
)
def test_as_accurate_as_eager(sizes: tuple[int, int, int, int, int], mask: str, dtype: torch.dtype) -> None:
    options = {"key_padding_mask": make_mask(mask, sizes[0], sizes[3])}
    inputs = make_inputs(*sizes, dtype=dtype)
    # torch's own fused attention errs up to three times as much as the formula in float32, depending on the processor.
    assert_parity(
        partial(reference.causal_attention, **options), partial(attention_formula, **options), inputs, slack=3
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_sees_itself(dtype: torch.dtype) -> None:
    inputs, upstream = make_inputs(2, 3, 1, 1, 8, dtype=dtype), random(2, 3, 1, 8, seed=5).to(dtype)
    assert torch.equal(reference.causal_attention(*inputs), inputs[2])
    dq, dk, dv = gradients(reference.causal_attention, inputs, [upstream])
    assert torch.equal(dv, upstream)
    for zero in (dq, dk):
        assert max_error(zero, torch.zeros_like(zero)) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("n_keys", [1, 6, 9])
def test_gradients_are_those_of_finite_differences(n_keys: int, mask: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 2, min(n_keys, 6), n_keys, 3, dtype=torch.float64)]
    attention = partial(reference.causal_attention, key_padding_mask=make_mask(mask, 2, n_keys))
    assert torch.autograd.gradcheck(attention, inputs)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 40), st.integers(1, 72)),
    n_past=st.integers(0, 40),
    mask=st.sampled_from(MASKS),
    scale=st.sampled_from([None, 0.0, 0.3, -1.0]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_arguments(
    sizes: tuple[int, int, int, int],
    n_past: int,
    mask: str,
    scale: float | None,
    dtype: torch.dtype,
    layout: str,
) -> None:
    n_batch, n_heads, n_queries, head_size = sizes
    inputs = make_inputs(n_batch, n_heads, n_queries, n_queries + n_past, head_size, dtype=dtype, layout=layout)
    options = {"scale": scale, "key_padding_mask": make_mask(mask, n_batch, n_queries + n_past)}
    upstream = [relayout(random(*inputs[0].shape, seed=5).to(dtype), layout)]
    assert_parity(
        partial(reference.causal_attention, **options),
        partial(attention_formula, **options),
        inputs,
        upstream,
        slack=4,
    )


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
@pytest.mark.parametrize("n_queries", [1, 2, 16, 18])
def test_queries_sit_at_the_end_of_the_keys(n_queries: int, mask: str) -> None:
    q, k, v = make_inputs(2, 2, 19, 19, 16)
    attention = partial(reference.causal_attention, key_padding_mask=make_mask(mask, 2, 19))
    full = attention(q, k, v)
    tail = attention(q[:, :, -n_queries:], k, v)
    torch.testing.assert_close(tail, full[:, :, -n_queries:])


@pytest.mark.parametrize("mask", ["none", "left"])
def test_later_keys_change_nothing(mask: str) -> None:
    q, k, v = make_inputs(2, 2, 12, 12, 8)
    attention = partial(reference.causal_attention, key_padding_mask=make_mask(mask, 2, 12))
    before = attention(q, k, v)
    k[:, :, 7:], v[:, :, 7:] = 5.0, -9.0
    after = attention(q, k, v)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.isclose(before[0, :, 7:], after[0, :, 7:]).all(-1).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_qkv_is_read_in_place(dtype: torch.dtype) -> None:
    packed = random(2, 9, 3 * 4 * 16).to(dtype)
    mask = make_mask("left", 2, 9)

    def attend(attention, packed: Tensor) -> Tensor:
        q, k, v = packed.view(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, key_padding_mask=mask).transpose(1, 2).reshape(2, 9, 64)

    assert_parity(partial(attend, reference.causal_attention), partial(attend, attention_formula), [packed], slack=2)


@pytest.mark.parametrize("mask", ["none", "right"])
def test_huge_scores_stay_finite(mask: str) -> None:
    """exp of a score overflows where the row's largest is not taken off first."""
    q, k, v = make_inputs(1, 2, 9, 9, 16)
    options = {"scale": 1e4, "key_padding_mask": make_mask(mask, 1, 9)}
    attended = reference.causal_attention(q, k, v, **options)
    assert max_error(attended, attention_formula(q.double(), k.double(), v.double(), **options)) < 1e-2


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
        ((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8), torch.ones(2, 5).bool(), r"\(2, 4\), not .* \(2, 5\)"),
        ((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8), torch.ones(2, 1, 1, 4).bool(), r"\(2, 4\), not .* \(2, 1, 1, 4\)"),
        ((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8), torch.ones(2, 4), "must be bool .* not torch.float32"),
    ],
)
def test_wrong_shapes_are_named(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], mask: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"causal_attention: .*{message}"):
        reference.causal_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), key_padding_mask=mask)


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bug_fully_masked_row_gives_nan(dropout_p: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 2, 6, 6, 8, dtype=dtype)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0], mask[1, :4] = False, False  # nothing to see in sequence 0, nor for the first four queries of sequence 1
    attention = partial(reference.causal_attention, key_padding_mask=mask, dropout_p=dropout_p, seed=3)
    attended = attention(*inputs)
    dq, dk, dv = gradients(attention, inputs, [torch.ones_like(attended)])
    for zero in (attended[0], attended[1, :, :4], dq[0], dk[0], dv[0], dq[1, :, :4], dk[1, :, :4], dv[1, :, :4]):
        assert torch.equal(zero, torch.zeros_like(zero))
    for tensor in (attended, dq, dk, dv):
        assert tensor.isfinite().all()
        assert (tensor[2] != 0).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["left", "right", "holes", "all"])
def test_bug_nan_at_masked_keys_leaks(kind: str, dropout_p: float, poison: float) -> None:
    q, k, v = make_inputs(2, 2, 7, 9, 8)
    mask = make_mask(kind, 2, 9)
    assert mask is not None
    hidden = ~mask[:, None, :, None]
    attention = partial(reference.causal_attention, key_padding_mask=mask, dropout_p=dropout_p, seed=3)
    upstream = [random(*q.shape, seed=5).float()]
    clean = attention(q, k, v), *gradients(attention, [q, k, v], upstream)
    poisoned = [q, k.masked_fill(hidden, poison), v.masked_fill(hidden, poison)]
    for ours, expected in zip((attention(*poisoned), *gradients(attention, poisoned, upstream)), clean, strict=True):
        assert torch.equal(ours, expected)
    _, _, dk, dv = clean
    for grad in (dk, dv):
        assert torch.equal(grad * hidden, torch.zeros_like(grad))


@pytest.mark.parametrize("side", ["left", "right"])
def test_bug_padded_batch_differs_from_single_sequences(side: str) -> None:
    lengths, n_tokens = [3, 11, 1, 8], 11
    rows = [slice(n_tokens - n, n_tokens) if side == "left" else slice(0, n) for n in lengths]
    q, k, v = make_inputs(4, 2, n_tokens, n_tokens, 16)
    mask = torch.zeros(4, n_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, row] = True
    batch = reference.causal_attention(q, k, v, key_padding_mask=mask)
    for i, row in enumerate(rows):
        single = reference.causal_attention(*(x[i : i + 1, :, row] for x in (q, k, v)))
        torch.testing.assert_close(batch[i : i + 1, :, row], single)


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("n_queries", [1, 4, 6])
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 0.02, -0.5])
def test_bug_scale_is_ignored(scale: float | None, n_queries: int, mask: str) -> None:
    options = {"scale": scale, "key_padding_mask": make_mask(mask, 2, 6)}
    inputs = make_inputs(2, 1, n_queries, 6, 8)
    assert_parity(
        partial(reference.causal_attention, **options), partial(attention_formula, **options), inputs, slack=4
    )


@pytest.mark.parametrize("mask", ["none", "right"])
def test_bug_more_heads_than_a_grid_axis_holds(mask: str) -> None:
    inputs, padding = make_inputs(257, 256, 2, 3, 4), make_mask(mask, 257, 3)
    expected = attention_formula(*inputs, key_padding_mask=padding)
    assert max_error(reference.causal_attention(*inputs, key_padding_mask=padding), expected) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_bug_strided_upstream_gradient(mask: str, layout: str) -> None:
    inputs = make_inputs(2, 3, 5, 7, 16, layout=layout)
    options = {"key_padding_mask": make_mask(mask, 2, 7)}
    functions = partial(reference.causal_attention, **options), partial(attention_formula, **options)
    assert_parity(*functions, inputs, [relayout(random(2, 3, 5, 16, seed=5).float(), layout)], slack=4)


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bug_results_differ_between_runs(dropout_p: float, mask: str) -> None:
    inputs, upstream = make_inputs(2, 2, 65, 65, 16), [random(2, 2, 65, 16, seed=5).float()]
    options = {"key_padding_mask": make_mask(mask, 2, 65), "dropout_p": dropout_p, "seed": 11}
    attention = partial(reference.causal_attention, **options)
    first = attention(*inputs), *gradients(attention, inputs, upstream)
    for _ in range(3):
        again = attention(*inputs), *gradients(attention, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bug_autocast_mixes_dtypes(dropout_p: float, mask: str) -> None:
    q, k, v = make_inputs(2, 2, 6, 6, 16)
    options = {"key_padding_mask": make_mask(mask, 2, 6), "dropout_p": dropout_p, "seed": 3}
    expected = reference.causal_attention(q, k, v, **options)
    # A query straight from a product in bfloat16, keys from a cache in float32.
    with torch.autocast("cpu", torch.bfloat16):
        attended = reference.causal_attention(q.bfloat16(), k, v, **options)
    assert attended.dtype == torch.bfloat16
    assert max_error(attended, expected) < 0.05


def test_bug_graph_breaks_when_lengths_vary() -> None:
    torch.compiler.reset()
    compiled = torch.compile(reference.causal_attention, backend="eager", fullgraph=True, dynamic=True)
    for n_tokens in (5, 9):
        inputs = make_inputs(2, 2, n_tokens, n_tokens, 8)
        torch.testing.assert_close(compiled(*inputs), reference.causal_attention(*inputs))
