"""The kernels of sampling without filters, and the helpers that they share with the filtering kernel.

Many programs reduce the scores of a row to the best of every group of 16 tokens; then one program per row takes the
best of these.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# Triton types compile-time parameters as constexpr, which no literal is, and tensors as types that they are not.

import triton
import triton.language as tl

from ...common.arithmetic import LOG2_E
from ...common.dropout import PHILOX_ROUNDS
from .reference import SAMPLING_STREAM

GROUP_SIZE = 16
_GROUP = tl.constexpr(GROUP_SIZE)
_PHILOX_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_SAMPLING_STREAM = tl.constexpr(SAMPLING_STREAM)
_LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)


# --- scores ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scores(row_logits_ptr, row_seen_ptr, tokens, in_row, penalty, HAS_PENALTY: tl.constexpr):
    """The penalised scores of tokens, and where a logit is NaN. No score is NaN or -0; outside in_row all are -inf."""
    score = tl.load(row_logits_ptr + tokens, mask=in_row, other=float("-inf")).to(tl.float32)
    if HAS_PENALTY:
        seen = tl.load(row_seen_ptr + tokens, mask=in_row, other=0) != 0
        # Correctly rounded, so that scores which are equal in the reference are equal here.
        penalised = tl.where(score < 0.0, score * penalty, tl.div_rn(score, penalty))
        score = tl.where(seen, penalised, score)
    is_nan = score != score
    # The sum turns -0 into 0: scores that compare as equal have equal bits, whichever lane of a reduction is last.
    return tl.where(is_nan, float("-inf"), tl.minimum(score, _LARGEST_FLOAT32) + 0.0), is_nan


@triton.jit
def _bar_ends(score, tokens, eos_ptr, N_EOS: tl.constexpr):
    """The scores, with those of end tokens at -inf."""
    for i in tl.static_range(N_EOS):
        score = tl.where(tokens == tl.load(eos_ptr + i), float("-inf"), score)
    return score


@triton.jit
def _noise_of_words(word):
    """Standard Gumbel noise -log(-log(u)) from u = (word + 1/2) / 2**32 in (0, 1), finite for every word (uint32).

    Near 1, where float32 is coarse, -log(u) is computed as a series in v = 1 - u.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 8
    for i in tl.static_range(7, 0, -1):
        series = series * v + 1.0 / i
    return -tl.log(tl.where(v < 0.125, series * v, -tl.log(u)))


@triton.jit
def _add_noise(score, group, member, seed, position, continuation, inverse_temperature):
    """score / temperature + the noise of `reference.gumbel_noise`, for tokens group * 16 + member.

    Kept apart from group, member shows the compiler which four tokens share a Philox call, and that one thread holds
    them.
    """
    quad = group * (_GROUP // 4) + (member >> 2)
    zero = quad * 0
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, quad, zero + position, zero + continuation, zero + _SAMPLING_STREAM, _PHILOX_ROUNDS
    )
    is_low, is_even = (member & 2) == 0, (member & 1) == 0
    word = tl.where(is_low, tl.where(is_even, word_0, word_1), tl.where(is_even, word_2, word_3))
    return score * inverse_temperature + _noise_of_words(word)


@triton.jit
def _mass(score, largest, inverse_temperature):
    """exp((score - largest) / temperature), also where both are -inf."""
    shift = tl.maximum(largest, -_LARGEST_FLOAT32)
    return tl.exp2((score - shift) * (inverse_temperature * LOG2_E))


@triton.jit(do_not_specialize=["min_length", "n_continuations"])
def _sampling_groups_kernel(
    logits_ptr, seen_ptr, eos_ptr, seed_ptr, position_ptr, slot_ptr, group_score_ptr, group_token_ptr, group_mass_ptr,
    logits_row_stride, seen_row_stride, n_cols, n_groups, penalty, inverse_temperature, min_length, n_continuations,
    BLOCK_GROUPS: tl.constexpr, N_EOS: tl.constexpr,
    HAS_PENALTY: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_MASS: tl.constexpr,
):  # fmt: skip
    """One program reduces BLOCK_GROUPS groups of one row's tokens to the best score of each, NaN if a logit is NaN.

    HAS_NOISE: scores are divided by the temperature, and noise is added. HAS_MASS: store each group's sum of
    exp((score - best) / temperature) too.
    """
    n_tiles = tl.cdiv(n_groups, BLOCK_GROUPS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    group = (tl.program_id(0) % n_tiles) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, _GROUP)[None, :]
    tokens = group[:, None] * _GROUP + member

    bars_ends = tl.load(slot_ptr + row) + 1 < min_length
    row_logits_ptr = logits_ptr + row * logits_row_stride
    row_seen_ptr = seen_ptr + row * seen_row_stride if HAS_PENALTY else None
    score, is_nan = _load_scores(row_logits_ptr, row_seen_ptr, tokens, tokens < n_cols, penalty, HAS_PENALTY)
    if bars_ends:
        score = _bar_ends(score, tokens, eos_ptr, N_EOS)
    if HAS_NOISE:
        position = (tl.load(position_ptr + row) + 1).to(tl.int32)
        continuation = (row % n_continuations).to(tl.int32)
        score = _add_noise(
            score, group[:, None], member, tl.load(seed_ptr), position, continuation, inverse_temperature
        )

    best = tl.max(score, axis=1)
    token = tl.min(tl.where(score == best[:, None], tokens, n_cols), axis=1)
    has_nan = tl.max(is_nan.to(tl.int32), axis=1) > 0

    offsets = row * n_groups + group
    in_row = group < n_groups
    tl.store(group_score_ptr + offsets, tl.where(has_nan, float("nan"), best), mask=in_row)
    tl.store(group_token_ptr + offsets, token, mask=in_row)
    if HAS_MASS:
        mass = tl.sum(_mass(score, best[:, None], inverse_temperature), axis=1)
        tl.store(group_mass_ptr + offsets, mass, mask=in_row)


# --- the choice -----------------------------------------------------------------------------------------------------


@triton.jit
def _best_token(best, token, n_cols):
    """The token of the largest score of all lanes, the lowest among equals; 0 where no score is above -inf."""
    token = tl.min(tl.where(best == tl.max(best, axis=0), token, n_cols), axis=0)
    return tl.where(token < n_cols, token, 0)


@triton.jit
def _advance(
    row, token, has_nan, eos_ptr, token_ptr, position_ptr, slot_ptr, finished_ptr, sequence_ptr, seen_ptr,
    sequence_row_stride, seen_row_stride, n_slots, n_cols, pad_id, HAS_PENALTY: tl.constexpr, N_EOS: tl.constexpr,
):  # fmt: skip
    """Append the new token to a row, or pad_id if the row is already finished."""
    finished = tl.load(finished_ptr + row) != 0
    token = tl.where(finished, pad_id, tl.where(has_nan, -1, token)).to(tl.int64)
    finished = finished | has_nan
    for i in tl.static_range(N_EOS):
        finished = finished | (token == tl.load(eos_ptr + i))
    position, slot = tl.load(position_ptr + row) + 1, tl.load(slot_ptr + row) + 1
    tl.debug_barrier()  # Every thread has loaded what one thread overwrites.

    tl.store(token_ptr + row, token)
    tl.store(position_ptr + row, position)
    tl.store(slot_ptr + row, slot)
    tl.store(finished_ptr + row, finished)
    tl.store(sequence_ptr + row * sequence_row_stride + slot, token, mask=(slot >= 0) & (slot < n_slots))
    if HAS_PENALTY:
        tl.store(seen_ptr + row * seen_row_stride + token, True, mask=(token >= 0) & (token < n_cols))


@triton.jit(do_not_specialize=["sequence_row_stride", "n_slots", "pad_id"])
def _sampling_choice_kernel(
    group_score_ptr, group_token_ptr, eos_ptr, token_ptr, position_ptr, slot_ptr, finished_ptr, sequence_ptr, seen_ptr,
    sequence_row_stride, seen_row_stride, n_slots, n_cols, n_groups, pad_id,
    BLOCK: tl.constexpr, N_EOS: tl.constexpr, HAS_PENALTY: tl.constexpr,
):  # fmt: skip
    """One program takes the best token of all groups of a row."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    best_token = tl.zeros((BLOCK,), dtype=tl.int32) + n_cols
    has_nan = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, n_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        offsets, in_row = row * n_groups + group, group < n_groups
        score = tl.load(group_score_ptr + offsets, mask=in_row, other=float("-inf"))
        token = tl.load(group_token_ptr + offsets, mask=in_row, other=0)
        has_nan |= (score != score).to(tl.int32)
        better = score > best
        best, best_token = tl.where(better, score, best), tl.where(better, token, best_token)

    _advance(
        row, _best_token(best, best_token, n_cols), tl.max(has_nan, axis=0) > 0,
        eos_ptr, token_ptr, position_ptr, slot_ptr, finished_ptr, sequence_ptr, seen_ptr,
        sequence_row_stride, seen_row_stride, n_slots, n_cols, pad_id, HAS_PENALTY, N_EOS,
    )  # fmt: skip
