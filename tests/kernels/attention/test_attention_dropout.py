"""Dropout in causal_attention: which weights it drops is a function of the seed and the position alone."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accuracy import DTYPES, assert_parity, gradients, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.common import dropout
from torch import Tensor

from .formula import dropped_formula

UINT32 = 0xFFFFFFFF
PI_COUNTER, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
# Random123's kat_vectors for philox4x32: rounds, counter, key, output.
KNOWN_ANSWERS = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (UINT32,) * 4, (UINT32,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (UINT32,) * 4, (UINT32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...], n_rounds: int) -> tuple[int, ...]:
    """Philox 4x32 in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(n_rounds):
        high_0, low_0 = divmod(c0 * 0xD2511F53, 2**32)
        high_2, low_2 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def draw(seed: int, batch_head: int, query: int, key: int) -> int:
    """The 16 random bits of one attention weight: bit 3 of the query, bits 3 and 0 of the key choose among eight."""
    q_group, k_group = query // 16 * 8 + query % 8, key // 16 * 4 + key % 8 // 2
    words = philox((k_group, q_group, batch_head, 0), (seed % 2**32, seed // 2**32 % 2**32), 7)
    word = words[query // 8 % 2 * 2 + key // 8 % 2]
    return word >> 16 if key % 2 else word & 0xFFFF


def two_sided(n_hits: int, n_trials: int, p: float) -> float:
    """The probability that a binomial count lies at least as far to its side of the mean as n_hits, twice."""
    counts = range(n_hits, n_trials + 1) if n_hits > n_trials * p else range(n_hits + 1)
    log_choose = math.lgamma(n_trials + 1)
    return 2 * sum(
        math.exp(
            log_choose
            - math.lgamma(k + 1)
            - math.lgamma(n_trials - k + 1)
            + k * math.log(p)
            + (n_trials - k) * math.log1p(-p)
        )
        for k in counts
    )


def keep_mask(*shape: int, dropout_p: float = 0.5, seed: int | Tensor | None = 0) -> Tensor:
    """(B, H, Tq, Tk), bool."""
    n_batch, n_heads, n_queries, n_keys = shape
    return dropout.dropout_keep_mask((n_batch, n_heads, n_queries, n_keys), dropout_p, seed)[0]


def make_inputs(n_queries: int, n_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for B = 2, H = 3, D = 16."""
    q, k, v = (random(2, 3, n, 16, seed=seed).to(dtype) for seed, n in enumerate((n_queries, n_keys, n_keys)))
    return q, k, v


# --- the random bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(
    n_rounds: int,
    counter: tuple[int, ...],
    key: tuple[int, ...],
    answer: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert philox(counter, key, n_rounds) == answer
    monkeypatch.setattr(dropout, "PHILOX_ROUNDS", n_rounds)
    seed = dropout.seed_tensor(key[1] << 32 | key[0], "cpu")
    assert tuple(int(word) for word in dropout.philox([torch.tensor(word) for word in counter], seed)) == answer


PHILOX_IN_TRITON = """
import sys, torch, triton, triton.language as tl

@triton.jit
def philox_kernel(counter_ptr, seed_ptr, words_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + cols)
    c1 = tl.load(counter_ptr + BLOCK + cols)
    c2 = tl.load(counter_ptr + 2 * BLOCK + cols)
    c3 = tl.load(counter_ptr + 3 * BLOCK + cols)
    c0, c1, c2, c3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3, n_rounds=7)
    tl.store(words_ptr + cols, c0)
    tl.store(words_ptr + BLOCK + cols, c1)
    tl.store(words_ptr + 2 * BLOCK + cols, c2)
    tl.store(words_ptr + 3 * BLOCK + cols, c3)

counter, seed = torch.load(sys.argv[1])
words = torch.empty_like(counter)
philox_kernel[(1,)](counter.to(torch.int32), seed, words, counter.shape[1])
torch.save(words & 0xFFFFFFFF, sys.argv[1])
"""


def test_philox_equals_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script, exchange = tmp_path / "philox_in_triton.py", tmp_path / "exchange.pt"
    script.write_text(PHILOX_IN_TRITON)
    counter = torch.randint(2**32, (4, 64), generator=torch.Generator().manual_seed(0))
    seed = torch.tensor([-(2**62) - 12345])
    torch.save((counter, seed), exchange)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(script), str(exchange)], env=environment, check=True, timeout=120)
    assert torch.equal(torch.stack(dropout.philox(list(counter), seed[0])), torch.load(exchange))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, -1, 0x0123456789ABCDEF])
def test_mask_bit_for_bit(seed: int) -> None:
    n_heads, n_queries, n_keys, dropout_p = 3, 19, 35, 0.3
    keep = keep_mask(2, n_heads, n_queries, n_keys, dropout_p=dropout_p, seed=seed)
    for b, h, i, j in [(b, h, i, j) for b in (0, 1) for h in (0, 2) for i in range(n_queries) for j in range(n_keys)]:
        assert keep[b, h, i, j] == (draw(seed, b * n_heads + h, i, j) >= round(dropout_p * 65536))


def test_threshold_is_exact() -> None:
    """A weight stays when its draw reaches the share that is dropped, in units of 1/65536."""
    for query, key in ((0, 0), (9, 4), (15, 15)):
        bits = draw(5, 0, query, key)
        assert keep_mask(1, 1, 16, 16, dropout_p=bits / 65536, seed=5)[0, 0, query, key]
        assert not keep_mask(1, 1, 16, 16, dropout_p=(bits + 1) / 65536, seed=5)[0, 0, query, key]


# --- the seed -------------------------------------------------------------------------------------------------------


def test_same_seed_same_mask_other_seed_other_mask() -> None:
    seeds = [0, 1, 2, 1 << 16, 1 << 31, 1 << 32, 1 << 33, 1 << 62, 2**63 - 1, 2**63, 2**64 - 1]
    masks = [keep_mask(1, 2, 16, 32, seed=seed) for seed in seeds]
    assert all(torch.equal(mask, keep_mask(1, 2, 16, 32, seed=seed)) for seed, mask in zip(seeds, masks, strict=True))
    assert len({mask.numpy().tobytes() for mask in masks}) == len(seeds)
    assert torch.equal(masks[-1], keep_mask(1, 2, 16, 32, seed=-1))  # the same 64 bits


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_seed_in_a_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert torch.equal(keep_mask(1, 1, 9, 9, seed=torch.full(shape, 77, dtype=dtype)), keep_mask(1, 1, 9, 9, seed=77))


def test_seed_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first, second = keep_mask(1, 1, 16, 16, seed=None), keep_mask(1, 1, 16, 16, seed=None)
    torch.manual_seed(5)
    assert torch.equal(first, keep_mask(1, 1, 16, 16, seed=None))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, float("nan"), torch.tensor(1.0), torch.tensor([1, 2])])
def test_wrong_seed_is_refused(seed: int | Tensor) -> None:
    with pytest.raises(ValueError, match="dropout seed must"):
        reference.causal_attention(*make_inputs(4, 4), dropout_p=0.1, seed=seed)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_wrong_dropout_is_refused(dropout_p: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout_p must be in \[0, 1\), not {dropout_p}"):
        reference.causal_attention(*make_inputs(4, 4), dropout_p=dropout_p)


# --- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [1e-4, 0.1, 0.5, 0.9, 0.999])
def test_rate(dropout_p: float) -> None:
    keep, keep_scale = dropout.dropout_keep_mask((2, 4, 96, 160), dropout_p, seed=2024)
    p = dropout.dropout_threshold(dropout_p) / 65536
    assert abs(p - dropout_p) <= 0.5 / 65536
    assert keep_scale * (1 - p) == pytest.approx(1.0, abs=1e-12)
    assert two_sided(int((~keep).sum()), keep.numel(), p) > 1e-6
    for axis in range(4):  # no head, query or key is dropped more than another
        dropped = (~keep).movedim(axis, 0).flatten(1)
        for count in dropped.sum(1).tolist():
            assert two_sided(count, dropped.shape[1], p) > 1e-6


@pytest.mark.parametrize("offset", [(0, 1), (0, 8), (8, 0), (8, 9), (0, 2), (1, 0), (0, 16), (16, 0), (7, 7)])
def test_neighbours_are_independent(offset: tuple[int, int]) -> None:
    """Among them all pairs of positions that share one Philox call."""
    keep = keep_mask(2, 4, 96, 160, seed=7)
    rows, cols = offset
    first, second = keep[:, :, : 96 - rows, : 160 - cols], keep[:, :, rows:, cols:]
    assert two_sided(int((first == second).sum()), first.numel(), 0.5) > 1e-6


def test_heads_and_sequences_are_independent() -> None:
    keep = keep_mask(3, 4, 64, 64, seed=7).flatten(0, 1).flatten(1)
    for i in range(12):
        for j in range(i):
            assert two_sided(int((keep[i] == keep[j]).sum()), 64 * 64, 0.5) > 1e-6


def test_mean_is_preserved() -> None:
    q, k, v = make_inputs(24, 24, torch.float64)
    exact = reference.causal_attention(q, k, v)
    samples = torch.stack([reference.causal_attention(q, k, v, dropout_p=0.3, seed=seed) for seed in range(400)])
    standard_error = samples.std(0) / len(samples) ** 0.5
    z = (samples.mean(0) - exact) / standard_error
    assert z.abs().max() < 5.5  # one in thirty million, for each of 2304 values
    assert abs(z.square().mean() - 1) < 0.3  # and as spread as chance has it


@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (17, 33), (40, 70)])
def test_mask_depends_on_the_position_alone(sizes: tuple[int, int]) -> None:
    n_queries, n_keys = sizes
    full = keep_mask(2, 3, 40, 70, seed=9)
    assert torch.equal(full[:, :, :n_queries, :n_keys], keep_mask(2, 3, n_queries, n_keys, seed=9))


# --- in attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [(1, 7), (33, 33), (5, 40)])
def test_bug_backward_drops_other_weights_than_forward(
    sizes: tuple[int, int], padded: bool, dtype: torch.dtype
) -> None:
    mask = torch.ones(2, sizes[1], dtype=torch.bool)
    mask[1, 1:3] = False
    mask = mask if padded else None
    options = {"scale": 0.4, "dropout_p": 0.25, "seed": 3}
    attention = partial(reference.causal_attention, key_padding_mask=mask, **options)
    assert_parity(attention, partial(dropped_formula, mask=mask, **options), make_inputs(*sizes, dtype), slack=2)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(3, 5, torch.float64)]
    assert torch.autograd.gradcheck(partial(reference.causal_attention, dropout_p=0.4, seed=8), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_does_not_depend_on_dtype_or_layout(dtype: torch.dtype) -> None:
    """Equal scores and values that are unit vectors make the output the pattern of the kept weights."""
    q = torch.zeros(2, 3, 16, 16, dtype=dtype)
    v = torch.eye(16, dtype=dtype).expand(2, 3, 16, 16)
    expected = keep_mask(2, 3, 16, 16, dropout_p=0.4, seed=6).tril()
    for layout in ("contiguous", "padded", "transposed"):
        arguments = [relayout(x, layout) for x in (q, q, v)]
        attended = reference.causal_attention(*arguments, dropout_p=0.4, seed=6)
        assert torch.equal(attended != 0, expected)
        _, _, dv = gradients(partial(reference.causal_attention, dropout_p=0.4, seed=6), arguments, [v])
        assert torch.equal(dv != 0, expected.mT)


def test_without_dropout_the_seed_changes_nothing() -> None:
    inputs = make_inputs(9, 9)
    assert torch.equal(reference.causal_attention(*inputs, seed=3), reference.causal_attention(*inputs))
    almost_none = reference.causal_attention(*inputs, dropout_p=1e-9, seed=3)
    torch.testing.assert_close(almost_none, reference.causal_attention(*inputs))


@pytest.mark.parametrize("dropout_p", [0.99, 0.99999, math.nextafter(1.0, 0.0)])
def test_dropout_of_nearly_everything_stays_finite(dropout_p: float) -> None:
    inputs, upstream = make_inputs(33, 33), [random(2, 3, 33, 16, seed=5).float()]
    attention = partial(reference.causal_attention, dropout_p=dropout_p, seed=3)
    assert all(x.isfinite().all() for x in (attention(*inputs), *gradients(attention, inputs, upstream)))
    assert (attention(*inputs) == 0).all(-1).any()


def test_bug_address_of_the_seed_used_for_its_value() -> None:
    inputs = make_inputs(16, 16)
    seed = torch.tensor(4)
    before = reference.causal_attention(*inputs, dropout_p=0.5, seed=seed)
    assert torch.equal(before, reference.causal_attention(*inputs, dropout_p=0.5, seed=torch.tensor(4)))
    seed += 1  # as a captured graph advances its seed between replays
    assert not torch.equal(before, reference.causal_attention(*inputs, dropout_p=0.5, seed=seed))
