"""The kernels of sampling, and the forms in which they ship.

Many programs reduce the scores of a row to the best of every 16 tokens, a group; then one program a row chooses. Where
nothing filters, it takes the best of those. Else it gathers the few groups that can hold a kept token, and looks at
their scores alone: all 50,257 would not fit into its registers.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# Triton declares compile-time parameters as constexpr, a type that no literal has, and tensors as what they are not.

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

from .. import tuning
from ..reference import PHILOX_ROUNDS
from ..sampling_reference import SAMPLING_STREAM
from .launch import Configuration

GROUP_SIZE = 16
_GROUP = tl.constexpr(GROUP_SIZE)
_PHILOX_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_SAMPLING_STREAM = tl.constexpr(SAMPLING_STREAM)
_LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)
_LOG2_E = tl.constexpr(1.4426950408889634)


# --- scores ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scores(
    row_logits_ptr, row_seen_ptr, eos_ptr, tokens, in_row, penalty, bars_ends,
    HAS_PENALTY: tl.constexpr, N_EOS: tl.constexpr,
):  # fmt: skip
    """The penalised scores of tokens, never NaN and -inf outside in_row, and where a logit is NaN."""
    score = tl.load(row_logits_ptr + tokens, mask=in_row, other=float("-inf")).to(tl.float32)
    if HAS_PENALTY:
        seen = tl.load(row_seen_ptr + tokens, mask=in_row, other=0) != 0
        # Said to round, so that scores which the reference makes equal are equal here.
        penalised = tl.where(score < 0.0, score * penalty, tl.div_rn(score, penalty))
        score = tl.where(seen, penalised, score)
    for i in tl.static_range(N_EOS):
        score = tl.where(bars_ends & (tokens == tl.load(eos_ptr + i)), float("-inf"), score)
    is_nan = score != score
    return tl.where(is_nan, float("-inf"), tl.minimum(score, _LARGEST_FLOAT32)), is_nan


@triton.jit
def _noise_of_words(word):
    """Standard Gumbel noise -log(-log(u)) from u = (word + 1/2) / 2**32 in (0, 1), finite for every word (uint32).

    Where u is close to 1, of which float32 has few numbers, -log(u) is the series of v = 1 - u instead.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 8
    for i in tl.static_range(7, 0, -1):
        series = series * v + 1.0 / i
    return -tl.log(tl.where(v < 0.125, series * v, -tl.log(u)))


@triton.jit
def _add_noise(score, group, member, seed, position, continuation, inverse_temperature):
    """score / temperature + the noise of `sampling_reference.gumbel_noise`, for tokens group * 16 + member.

    Of member alone the compiler sees which four tokens share a Philox call, and that one thread holds them.
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
    return tl.exp2((score - shift) * (inverse_temperature * _LOG2_E))


@triton.jit(do_not_specialize=["min_length", "n_continuations"])
def _sampling_groups_kernel(
    logits_ptr, seen_ptr, eos_ptr, seed_ptr, position_ptr, slot_ptr, group_score_ptr, group_token_ptr, group_mass_ptr,
    logits_row_stride, seen_row_stride, n_cols, n_groups, penalty, inverse_temperature, min_length, n_continuations,
    BLOCK_GROUPS: tl.constexpr, N_EOS: tl.constexpr,
    HAS_PENALTY: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_MASS: tl.constexpr,
):  # fmt: skip
    """One program reduces BLOCK_GROUPS groups of one row's tokens to the best score of each, NaN where a logit is.

    HAS_NOISE: scores are divided by the temperature and have noise. HAS_MASS: the sum over a group of
    exp((score - best) / temperature) is stored too.
    """
    n_tiles = tl.cdiv(n_groups, BLOCK_GROUPS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    group = (tl.program_id(0) % n_tiles) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, _GROUP)[None, :]
    tokens = group[:, None] * _GROUP + member

    bars_ends = tl.load(slot_ptr + row) + 1 < min_length
    row_logits_ptr = logits_ptr + row * logits_row_stride
    row_seen_ptr = seen_ptr + row * seen_row_stride if HAS_PENALTY else None
    score, is_nan = _load_scores(
        row_logits_ptr, row_seen_ptr, eos_ptr, tokens, tokens < n_cols, penalty, bars_ends, HAS_PENALTY, N_EOS
    )
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
    """Move a row on by its new token, or by pad_id where it is finished already."""
    finished = tl.load(finished_ptr + row) != 0
    token = tl.where(finished, pad_id, tl.where(has_nan, -1, token)).to(tl.int64)
    finished = finished | has_nan
    for i in tl.static_range(N_EOS):
        finished = finished | (token == tl.load(eos_ptr + i))
    slot = tl.load(slot_ptr + row) + 1

    tl.store(token_ptr + row, token)
    tl.store(position_ptr + row, tl.load(position_ptr + row) + 1)
    tl.store(slot_ptr + row, slot)
    tl.store(finished_ptr + row, finished)
    tl.store(sequence_ptr + row * sequence_row_stride + slot, token, mask=slot < n_slots)
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


# --- filters --------------------------------------------------------------------------------------------------------


@triton.jit
def _key(score):
    """A uint32 in the order of the scores; -0 counts as 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _score_of_key(key):
    """The score to which `_key` gives key."""
    return (key ^ tl.where(key >= 0x80000000, 0x80000000, 0xFFFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _search(
    score_ptr, n_scores, floor, largest, target, enough, inverse_temperature,
    BLOCK: tl.constexpr, WAYS: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The largest t in [floor, largest] for which the scores >= t weigh at least target; floor where none does.

    A score weighs 1, or its mass. Any t below that will do of which the scores >= t weigh no more than `enough`.
    Each round tries WAYS values of t, between which lie equally many floats.
    """
    lo, hi = _key(floor), _key(largest) + 1
    ways = tl.arange(0, WAYS).to(tl.uint32)
    reached = float("inf")
    while (hi - lo > 1) & (reached > enough):
        step = (hi - lo + (WAYS - 1)) // WAYS
        thresholds = lo + step * ways
        weights = tl.zeros((WAYS,), dtype=tl.float32)
        for start in range(0, n_scores, BLOCK):
            index = start + tl.arange(0, BLOCK)
            score = tl.load(score_ptr + index, mask=index < n_scores, other=float("-inf"))
            weight = _mass(score, largest, inverse_temperature) if BY_MASS else tl.full((BLOCK,), 1.0, tl.float32)
            # This way round a thread holds its scores once, and compares them with all thresholds.
            is_above = _key(score)[None, :] >= thresholds[:, None]
            weights += tl.sum(tl.where(is_above, weight[None, :], 0.0), axis=1)
        # The first is lo, of which that is known; the last may lie past hi.
        is_enough = ((weights >= target) & (thresholds < hi)) | (ways == 0)
        lo = tl.max(tl.where(is_enough, thresholds, lo), axis=0)
        hi = tl.minimum(hi, lo + step)
        reached = tl.min(tl.where(is_enough, weights, float("inf")), axis=0)
    return _score_of_key(lo)


@triton.jit
def _total_mass(score_ptr, group_mass_ptr, n_scores, floor, largest, inverse_temperature, BLOCK: tl.constexpr):
    """The mass of the scores >= floor; with group_mass_ptr, of the groups of which they are the best."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n_scores, BLOCK):
        index = start + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + index, mask=index < n_scores, other=float("-inf"))
        mass = _mass(score, largest, inverse_temperature)
        if group_mass_ptr is not None:
            mass *= tl.load(group_mass_ptr + index, mask=index < n_scores, other=0.0)
        total += tl.where(score >= floor, mass, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _range_of_scores(score_ptr, n_scores, BLOCK: tl.constexpr):
    """The smallest and the largest of the scores; the largest is NaN where one is."""
    smallest = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    has_nan = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, n_scores, BLOCK):
        index = start + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + index, mask=index < n_scores, other=float("-inf"))
        is_nan = score != score
        has_nan |= is_nan.to(tl.int32)
        largest = tl.where(is_nan, largest, tl.maximum(largest, score))
        smallest = tl.where((index < n_scores) & (score < smallest), score, smallest)
    largest = tl.where(tl.max(has_nan, axis=0) > 0, float("nan"), tl.max(largest, axis=0))
    return tl.min(smallest, axis=0), largest


@triton.jit
def _list_groups(group_score_ptr, group_list_ptr, n_groups, floor, BLOCK: tl.constexpr):
    """Write the groups with a score >= floor to group_list_ptr, in their order. Returns how many there are."""
    n_listed = 0
    for start in range(0, n_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        score = tl.load(group_score_ptr + group, mask=group < n_groups, other=float("nan"))
        is_listed = score >= floor
        place = n_listed + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
        tl.store(group_list_ptr + place, group, mask=is_listed)
        n_listed += tl.sum(is_listed.to(tl.int32), axis=0)
    return n_listed


@triton.jit(do_not_specialize=["sequence_row_stride", "n_slots", "pad_id", "min_length", "n_continuations", "top_k"])
def _sampling_filtered_choice_kernel(
    group_score_ptr, group_list_ptr, group_mass_ptr, logits_ptr, score_ptr, threshold_ptr, seed_ptr,
    eos_ptr, token_ptr, position_ptr, slot_ptr, finished_ptr, sequence_ptr, seen_ptr,
    logits_row_stride, sequence_row_stride, seen_row_stride, n_slots, n_cols, n_groups, pad_id,
    penalty, inverse_temperature, min_length, n_continuations, top_k, top_p, top_p_reach, min_p_reach,
    BLOCK: tl.constexpr, BLOCK_GROUPS: tl.constexpr, WAYS: tl.constexpr, N_EOS: tl.constexpr,
    HAS_PENALTY: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
):  # fmt: skip
    """One program keeps the scores of a row that lie above a threshold, and takes the largest behind noise.

    First it bounds the threshold from below by what is known of the groups, and writes the scores of the groups that
    reach the bound to score_ptr; from then on it looks at these alone. group_list_ptr (n_groups) and score_ptr
    (16 * n_groups) are scratch memory of each row, and the threshold goes to threshold_ptr. top_p_reach, min_p_reach:
    how far below the largest score (added to it, so <= 0) kept scores lie at most, the first plus temperature * log of
    the mass.
    """
    row = tl.program_id(0).to(tl.int64)
    group_score_ptr += row * n_groups
    group_list_ptr += row * n_groups
    score_ptr += row * n_groups * _GROUP

    smallest, largest = _range_of_scores(group_score_ptr, n_groups, BLOCK)
    min_p_threshold = largest + min_p_reach
    if HAS_TOP_K:
        # top_k groups with a best score of t and more hold as many tokens. Where a tile takes them, some more will do.
        enough = tl.maximum(top_k, BLOCK // _GROUP).to(tl.float32)
        floor = _search(
            group_score_ptr, n_groups, smallest, largest, top_k, enough, inverse_temperature, BLOCK, WAYS, False
        )
        floor = tl.where(top_k > n_groups, float("-inf"), floor)
    elif HAS_TOP_P:
        # Of V tokens with less than (1 - top_p) / V each, none is needed.
        mass = _total_mass(
            group_score_ptr, group_mass_ptr + row * n_groups, n_groups, float("-inf"), largest, inverse_temperature,
            BLOCK,
        )  # fmt: skip
        floor = tl.maximum(largest + (tl.log(mass) / inverse_temperature + top_p_reach), min_p_threshold)
    else:
        floor = min_p_threshold

    n_listed = _list_groups(group_score_ptr, group_list_ptr, n_groups, floor, BLOCK)
    n_scores = n_listed * _GROUP
    tl.debug_barrier()  # Other threads read the list.

    bars_ends = tl.load(slot_ptr + row) + 1 < min_length
    row_logits_ptr = logits_ptr + row * logits_row_stride
    row_seen_ptr = seen_ptr + row * seen_row_stride if HAS_PENALTY else None
    for start in range(0, n_scores, BLOCK):
        index = start + tl.arange(0, BLOCK)
        group = tl.load(group_list_ptr + index // _GROUP, mask=index < n_scores, other=n_groups)
        tokens = group * _GROUP + index % _GROUP
        score, _ = _load_scores(
            row_logits_ptr, row_seen_ptr, eos_ptr, tokens, tokens < n_cols, penalty, bars_ends, HAS_PENALTY, N_EOS
        )
        tl.store(score_ptr + index, score, mask=index < n_scores)
    tl.debug_barrier()  # Other threads read the scores.

    if HAS_TOP_K:
        floor = _search(score_ptr, n_scores, floor, largest, top_k, top_k, inverse_temperature, BLOCK, WAYS, False)
    if HAS_TOP_P:
        if HAS_TOP_K:
            mass = _total_mass(score_ptr, None, n_scores, floor, largest, inverse_temperature, BLOCK)
        floor = _search(score_ptr, n_scores, floor, largest, mass * top_p, 0.0, inverse_temperature, BLOCK, WAYS, True)
    threshold = tl.maximum(floor, min_p_threshold)
    tl.store(threshold_ptr + row, threshold)

    position = (tl.load(position_ptr + row) + 1).to(tl.int32)
    continuation = (row % n_continuations).to(tl.int32)
    seed = tl.load(seed_ptr)
    member = tl.arange(0, _GROUP)[None, :]
    best = tl.full((BLOCK_GROUPS, _GROUP), float("-inf"), dtype=tl.float32)
    best_token = tl.zeros((BLOCK_GROUPS, _GROUP), dtype=tl.int32) + n_cols
    for start in range(0, n_listed, BLOCK_GROUPS):
        place = start + tl.arange(0, BLOCK_GROUPS)[:, None]
        group = tl.load(group_list_ptr + place, mask=place < n_listed, other=0)
        score = tl.load(score_ptr + place * _GROUP + member, mask=place < n_listed, other=float("-inf"))
        noisy = _add_noise(score, group, member, seed, position, continuation, inverse_temperature)
        better = (score >= threshold) & (noisy > best)
        best, best_token = tl.where(better, noisy, best), tl.where(better, group * _GROUP + member, best_token)

    token = _best_token(tl.ravel(best), tl.ravel(best_token), n_cols)
    _advance(
        row, token, largest != largest,
        eos_ptr, token_ptr, position_ptr, slot_ptr, finished_ptr, sequence_ptr, seen_ptr,
        sequence_row_stride, seen_row_stride, n_slots, n_cols, pad_id, HAS_PENALTY, N_EOS,
    )  # fmt: skip


# --- audit ----------------------------------------------------------------------------------------------------------

_TYPES = {
    "seen_ptr": "*i1", "finished_ptr": "*i1",
    "eos_ptr": "*i64", "seed_ptr": "*i64", "position_ptr": "*i64", "slot_ptr": "*i64", "token_ptr": "*i64",
    "sequence_ptr": "*i64",
    "group_score_ptr": "*fp32", "group_mass_ptr": "*fp32", "score_ptr": "*fp32", "threshold_ptr": "*fp32",
    "group_token_ptr": "*i32", "group_list_ptr": "*i32",
    "penalty": "fp32", "inverse_temperature": "fp32", "top_p": "fp32", "top_p_reach": "fp32", "min_p_reach": "fp32",
}  # fmt: skip


def shipped_configurations(architecture: str) -> Iterator[Configuration]:
    """Every form, with one end token. float16 differs from bfloat16 in the conversions alone."""

    def configuration(kernel: Any, label: str, dtype: str, num_warps: int, **constants: Any) -> Configuration:
        absent = {} if constants["HAS_PENALTY"] else {"seen_ptr": None}
        return Configuration(
            operation="sample",
            kernel=kernel,
            label=f"{label}{', penalty' if constants['HAS_PENALTY'] else ''} {dtype}",
            dtype=dtype,
            constants=constants | {"N_EOS": 1} | absent,
            types=_TYPES,
            divisible=("logits_row_stride",),
            num_warps=num_warps,
        )

    for dtype, has_penalty in product(("bf16", "fp32"), (False, True)):
        for label, has_noise, has_mass in (("greedy", False, False), ("draw", True, False), ("mass", False, True)):
            yield configuration(
                _sampling_groups_kernel, label, dtype, tuning.SAMPLING_GROUPS_WARPS,
                BLOCK_GROUPS=tuning.SAMPLING_GROUPS, HAS_PENALTY=has_penalty, HAS_NOISE=has_noise, HAS_MASS=has_mass,
                **({} if has_noise else {"seed_ptr": None}), **({} if has_mass else {"group_mass_ptr": None}),
            )  # fmt: skip
        for has_top_k, has_top_p in product((False, True), (False, True)):
            filters = [name for name, has in (("top-k", has_top_k), ("top-p", has_top_p)) if has] or ["min-p"]
            yield configuration(
                _sampling_filtered_choice_kernel, ", ".join(filters), dtype, tuning.SAMPLING_CHOICE_WARPS,
                BLOCK=tuning.sampling_choice_block(architecture),
                BLOCK_GROUPS=tuning.SAMPLING_GROUPS, WAYS=tuning.SAMPLING_WAYS,
                HAS_PENALTY=has_penalty, HAS_TOP_K=has_top_k, HAS_TOP_P=has_top_p,
                **({} if has_top_p and not has_top_k else {"group_mass_ptr": None}),
            )  # fmt: skip
    for has_penalty in (False, True):
        yield configuration(
            _sampling_choice_kernel, "choice", "fp32", tuning.SAMPLING_CHOICE_WARPS,
            BLOCK=tuning.sampling_choice_block(architecture), HAS_PENALTY=has_penalty,
        )  # fmt: skip
