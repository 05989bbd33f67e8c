"""The kernel that chooses a row's token under top-k, top-p or min-p.

It first bounds the threshold from below with the best score and the mass of every group of 16 tokens. Then it reads the
logits of the groups that can hold a kept token once, and after that only the scores that reach the bound, because all
50,257 would not fit into its registers.

Every lane appends the scores that reach the bound to a list of its own: element i of lane l is stored at i * LANES + l.
So no lane has to wait for others before it knows where to write, as it would if all appended to one list.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# Triton types compile-time parameters as constexpr, which no literal is, and tensors as types that they are not.

import triton
import triton.language as tl

from .kernels import GROUP_SIZE, _add_noise, _advance, _bar_ends, _best_token, _load_scores, _mass

# Tokens that a lane loads at once from a group.
TOKENS_OF_LANE = 4
_GROUP = tl.constexpr(GROUP_SIZE)
# The search for top-p's bound stops this many floats short of the best bound, which is up to 1/16 of the score.
_BOUND_RESOLUTION = tl.constexpr(2**19)


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
def _cut(lo, hi, ways):
    """WAYS keys that split the range from lo to hi into WAYS + 1 parts."""
    n_ways: tl.constexpr = ways.shape[0]
    return lo + (hi - lo + n_ways) // (n_ways + 1) * (ways + 1)


# --- groups ---------------------------------------------------------------------------------------------------------


@triton.jit
def _range_of_scores(score_ptr, n_scores, LANES: tl.constexpr):
    """The smallest and the largest of the scores; the largest is NaN where one is."""
    smallest = tl.full((LANES,), float("inf"), dtype=tl.float32)
    largest = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    has_nan = tl.zeros((LANES,), dtype=tl.int32)
    for start in range(0, n_scores, LANES):
        index = start + tl.arange(0, LANES)
        score = tl.load(score_ptr + index, mask=index < n_scores, other=float("-inf"))
        is_nan = score != score
        has_nan |= is_nan.to(tl.int32)
        largest = tl.where(is_nan, largest, tl.maximum(largest, score))
        smallest = tl.where((index < n_scores) & (score < smallest), score, smallest)
    largest = tl.where(tl.max(has_nan, axis=0) > 0, float("nan"), tl.max(largest, axis=0))
    return tl.min(smallest, axis=0), largest


@triton.jit
def _total_mass(score_ptr, group_mass_ptr, n_groups, largest, inverse_temperature, LANES: tl.constexpr):
    """The sum of all groups' masses. score_ptr: the best score of each group."""
    total = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, n_groups, LANES):
        group = start + tl.arange(0, LANES)
        best = tl.load(score_ptr + group, mask=group < n_groups, other=float("-inf"))
        group_mass = tl.load(group_mass_ptr + group, mask=group < n_groups, other=0.0)
        total += _mass(best, largest, inverse_temperature) * group_mass
    return tl.sum(total, axis=0)


@triton.jit
def _bound_by_mass(
    score_ptr, group_mass_ptr, n_groups, floor, largest, target, inverse_temperature,
    LANES: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """A t in [floor, largest] such that the scores >= t certainly have the mass target; floor if there is none.

    In a group whose best score reaches t, each of the other scores that do not reach it has less mass than t.
    """
    lo, hi = _key(floor), _key(largest) + 1
    ways = tl.arange(0, WAYS).to(tl.uint32)
    while lo + _BOUND_RESOLUTION < hi:
        keys = _cut(lo, hi, ways)
        thresholds = _score_of_key(keys)[:, None]
        least = _mass(thresholds, largest, inverse_temperature) * (_GROUP - 1)
        sums = tl.zeros((WAYS, LANES), dtype=tl.float32)
        for start in range(0, n_groups, LANES):
            group = start + tl.arange(0, LANES)[None, :]
            best = tl.load(score_ptr + group, mask=group < n_groups, other=float("-inf"))
            group_mass = tl.load(group_mass_ptr + group, mask=group < n_groups, other=0.0)
            best_mass = _mass(best, largest, inverse_temperature)
            sums += tl.where(best >= thresholds, tl.maximum(best_mass, best_mass * group_mass - least), 0.0)
        is_enough = tl.sum(sums, axis=1) >= target
        lo = tl.max(tl.where(is_enough, keys, lo), axis=0)
        hi = tl.min(tl.where(is_enough, hi, keys), axis=0)
    return _score_of_key(lo)


# --- lists of lanes -------------------------------------------------------------------------------------------------


@triton.jit
def _list_score(score_ptr, token_ptr, end, score, token, floor, n_cols, LANES: tl.constexpr):
    """Append the scores >= floor, and their tokens, to the lists of their lanes. Returns the new ends (LANES,)."""
    is_listed = (score >= floor) & (token < n_cols)
    tl.store(score_ptr + end, score, mask=is_listed)
    tl.store(token_ptr + end, token, mask=is_listed)
    return end + tl.where(is_listed, LANES, 0)


@triton.jit
def _outermost(smallest, largest, end, other_smallest, other_largest, other_end):
    return tl.minimum(smallest, other_smallest), tl.maximum(largest, other_largest), tl.maximum(end, other_end)


@triton.jit
def _search(
    score_ptr, rest_ptr, spare_ptr, end, smallest, largest, target, enough, inverse_temperature,
    LANES: tl.constexpr, WAYS: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The largest t in [smallest, largest] with a sum of the listed scores >= t of at least target; else smallest.

    A score counts 1, or its mass if BY_MASS. The search stops early at a t whose scores add up to at most `enough`.
    end (LANES,): the ends of the lanes' lists.
    Each round tries WAYS values, spaced by equally many floats. The scores between the largest value that reaches the
    target and the smallest that does not are copied to rest_ptr and spare_ptr in turn; the next round reads only these.
    """
    lo, hi = _key(smallest), _key(largest) + 1
    ways = tl.arange(0, WAYS).to(tl.uint32)
    lane = tl.arange(0, LANES)
    last = tl.max(end, axis=0)
    reached, above = float("inf"), 0.0  # sums over the scores >= lo and >= hi
    while (lo + 1 < hi) & (reached > enough):
        keys = _cut(lo, hi, ways)
        thresholds = _score_of_key(keys)[:, None]
        # Each thread sums its own scores; reductions across warps are slow and run once per round.
        sums = tl.zeros((WAYS, LANES), dtype=tl.float32)
        for start in range(0, last - LANES + 1, LANES):
            place = start + lane
            score = tl.load(score_ptr + place, mask=place < end, other=float("-inf"))
            weight = _mass(score, largest, inverse_temperature) if BY_MASS else tl.full((LANES,), 1.0, tl.float32)
            sums += tl.where(score[None, :] >= thresholds, weight[None, :], 0.0)
        weights = above + tl.sum(sums, axis=1)
        is_enough = weights >= target
        lo = tl.max(tl.where(is_enough, keys, lo), axis=0)
        hi = tl.min(tl.where(is_enough, hi, keys), axis=0)
        reached = tl.min(tl.where(is_enough, weights, reached), axis=0)
        above = tl.max(tl.where(is_enough, above, weights), axis=0)

        least, bound = _score_of_key(lo), _score_of_key(hi)
        rest_end = lane
        smallest_rest = tl.full((LANES,), float("inf"), dtype=tl.float32)
        largest_rest = tl.full((LANES,), float("-inf"), dtype=tl.float32)
        for start in range(0, last - LANES + 1, LANES):
            place = start + lane
            score = tl.load(score_ptr + place, mask=place < end, other=float("nan"))
            is_rest = (score >= least) & (score < bound)
            tl.store(rest_ptr + rest_end, score, mask=is_rest)
            rest_end += tl.where(is_rest, LANES, 0)
            smallest_rest = tl.where(is_rest, tl.minimum(smallest_rest, score), smallest_rest)
            largest_rest = tl.where(is_rest, tl.maximum(largest_rest, score), largest_rest)
        # The answer is one of the remaining scores, or hi if none remains.
        end = rest_end
        smallest_rest, largest_rest, last = tl.reduce((smallest_rest, largest_rest, end), 0, _outermost)
        lo, hi = tl.minimum(_key(smallest_rest), hi), _key(largest_rest) + 1
        score_ptr, rest_ptr, spare_ptr = rest_ptr, spare_ptr, rest_ptr
        tl.debug_barrier()  # Other threads read the remaining scores.
    return _score_of_key(lo)


@triton.jit
def _listed_mass(score_ptr, end, floor, largest, inverse_temperature, LANES: tl.constexpr):
    """The mass of the listed scores >= floor."""
    total = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, tl.max(end, axis=0) - LANES + 1, LANES):
        place = start + tl.arange(0, LANES)
        score = tl.load(score_ptr + place, mask=place < end, other=float("-inf"))
        total += tl.where(score >= floor, _mass(score, largest, inverse_temperature), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _list_kept(score_ptr, kept_ptr, end, threshold, LANES: tl.constexpr):
    """Write the places of the listed scores >= threshold to kept_ptr, without gaps. Returns their number."""
    lane = tl.arange(0, LANES)
    n_kept = tl.zeros((LANES,), dtype=tl.int32)
    last = tl.max(end, axis=0)
    for start in range(0, last - LANES + 1, LANES):
        place = start + lane
        n_kept += (tl.load(score_ptr + place, mask=place < end, other=float("nan")) >= threshold).to(tl.int32)
    first = tl.cumsum(n_kept, axis=0) - n_kept
    for start in range(0, last - LANES + 1, LANES):
        place = start + lane
        is_kept = tl.load(score_ptr + place, mask=place < end, other=float("nan")) >= threshold
        tl.store(kept_ptr + first, place, mask=is_kept)
        first += is_kept.to(tl.int32)
    return tl.sum(n_kept, axis=0)


@triton.jit(do_not_specialize=["sequence_row_stride", "n_slots", "pad_id", "min_length", "n_continuations", "top_k"])
def _sampling_filtered_choice_kernel(
    group_score_ptr, group_list_ptr, group_mass_ptr, logits_ptr, score_ptr, index_ptr, threshold_ptr, seed_ptr,
    eos_ptr, token_ptr, position_ptr, slot_ptr, finished_ptr, sequence_ptr, seen_ptr,
    logits_row_stride, sequence_row_stride, seen_row_stride, n_slots, n_cols, n_groups, n_places, pad_id,
    penalty, inverse_temperature, min_length, n_continuations, top_k, top_p, top_p_reach, min_p_reach,
    LANES: tl.constexpr, WAYS: tl.constexpr, N_EOS: tl.constexpr,
    HAS_PENALTY: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
):  # fmt: skip
    """One program keeps the scores of a row above a threshold, adds noise and takes the largest.

    First it bounds the threshold from below with the groups' scores and masses, and lists the scores that reach the
    bound; from then on it reads only these. group_list_ptr (n_groups), score_ptr (3, n_places) and index_ptr
    (2, n_places) are scratch memory of each row, and the threshold goes to threshold_ptr. top_p_reach, min_p_reach: how
    far below the largest score (added to it, so <= 0) kept scores lie at most, the first plus temperature * log of the
    mass.
    """
    row = tl.program_id(0).to(tl.int64)
    group_score_ptr += row * n_groups
    group_list_ptr += row * n_groups
    score_ptr += row * 3 * n_places
    rest_ptr, spare_ptr = score_ptr + n_places, score_ptr + 2 * n_places
    listed_token_ptr = index_ptr + row * 2 * n_places
    kept_ptr = listed_token_ptr + n_places
    lane = tl.arange(0, LANES)

    smallest, largest = _range_of_scores(group_score_ptr, n_groups, LANES)
    min_p_threshold = largest + min_p_reach
    end_of_groups = (n_groups + LANES - 1 - lane) // LANES * LANES + lane
    if HAS_TOP_K:
        # top_k groups whose best score reaches t hold top_k tokens. It is enough to stop at as many as the lanes load.
        enough = tl.maximum(top_k, LANES // 4).to(tl.float32)
        floor = _search(
            group_score_ptr, rest_ptr, spare_ptr, end_of_groups, smallest, largest, top_k, enough, inverse_temperature,
            LANES, WAYS, False,
        )  # fmt: skip
        floor = tl.where(top_k > n_groups, float("-inf"), floor)
    elif HAS_TOP_P:
        # Tokens with a probability below (1 - top_p) / V are never needed: all V of them have less than 1 - top_p.
        group_mass_ptr += row * n_groups
        mass = _total_mass(group_score_ptr, group_mass_ptr, n_groups, largest, inverse_temperature, LANES)
        floor = tl.maximum(largest + (tl.log(mass) / inverse_temperature + top_p_reach), min_p_threshold)
        # A target a little above the mass that is needed, because sums round.
        floor = _bound_by_mass(
            group_score_ptr, group_mass_ptr, n_groups, floor, largest, mass * (top_p + (1 - top_p) / 64),
            inverse_temperature, LANES, WAYS,
        )  # fmt: skip
    else:
        floor = min_p_threshold

    n_groups_listed = _list_kept(group_score_ptr, group_list_ptr, end_of_groups, floor, LANES)
    tl.debug_barrier()  # Other threads read the list.

    bars_ends = tl.load(slot_ptr + row) + 1 < min_length
    row_logits_ptr = logits_ptr + row * logits_row_stride
    row_seen_ptr = seen_ptr + row * seen_row_stride if HAS_PENALTY else None
    end = lane
    for start in range(0, n_groups_listed, LANES // 4):
        # Four lanes share a group. Each loads four tokens before it lists one, because no load overtakes a store.
        place = start + lane // 4
        group = tl.load(group_list_ptr + place, mask=place < n_groups_listed, other=n_groups)
        token_0 = group * _GROUP + lane % 4
        token_1, token_2, token_3 = token_0 + 4, token_0 + 8, token_0 + 12
        score_0, _ = _load_scores(row_logits_ptr, row_seen_ptr, token_0, token_0 < n_cols, penalty, HAS_PENALTY)
        score_1, _ = _load_scores(row_logits_ptr, row_seen_ptr, token_1, token_1 < n_cols, penalty, HAS_PENALTY)
        score_2, _ = _load_scores(row_logits_ptr, row_seen_ptr, token_2, token_2 < n_cols, penalty, HAS_PENALTY)
        score_3, _ = _load_scores(row_logits_ptr, row_seen_ptr, token_3, token_3 < n_cols, penalty, HAS_PENALTY)
        if bars_ends:
            score_0 = _bar_ends(score_0, token_0, eos_ptr, N_EOS)
            score_1 = _bar_ends(score_1, token_1, eos_ptr, N_EOS)
            score_2 = _bar_ends(score_2, token_2, eos_ptr, N_EOS)
            score_3 = _bar_ends(score_3, token_3, eos_ptr, N_EOS)
        end = _list_score(score_ptr, listed_token_ptr, end, score_0, token_0, floor, n_cols, LANES)
        end = _list_score(score_ptr, listed_token_ptr, end, score_1, token_1, floor, n_cols, LANES)
        end = _list_score(score_ptr, listed_token_ptr, end, score_2, token_2, floor, n_cols, LANES)
        end = _list_score(score_ptr, listed_token_ptr, end, score_3, token_3, floor, n_cols, LANES)
    tl.debug_barrier()  # Other threads read the scores.

    if HAS_TOP_K:
        floor = _search(
            score_ptr, rest_ptr, spare_ptr, end, floor, largest, top_k, top_k, inverse_temperature,
            LANES, WAYS, False,
        )  # fmt: skip
    if HAS_TOP_P:
        if HAS_TOP_K:
            mass = _listed_mass(score_ptr, end, floor, largest, inverse_temperature, LANES)
        floor = _search(
            score_ptr, rest_ptr, spare_ptr, end, floor, largest, mass * top_p, 0.0, inverse_temperature,
            LANES, WAYS, True,
        )  # fmt: skip
    threshold = tl.maximum(floor, min_p_threshold)
    tl.store(threshold_ptr + row, threshold)
    n_kept = _list_kept(score_ptr, kept_ptr, end, threshold, LANES)
    tl.debug_barrier()  # Other threads read the list.

    position = (tl.load(position_ptr + row) + 1).to(tl.int32)
    continuation = (row % n_continuations).to(tl.int32)
    seed = tl.load(seed_ptr)
    best = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    best_token = tl.zeros((LANES,), dtype=tl.int32) + n_cols
    for start in range(0, n_kept, LANES):
        is_kept = start + lane < n_kept
        place = tl.load(kept_ptr + start + lane, mask=is_kept, other=0)
        token = tl.load(listed_token_ptr + place, mask=is_kept, other=n_cols)
        score = tl.load(score_ptr + place, mask=is_kept, other=float("-inf"))
        noisy = _add_noise(score, token // _GROUP, token % _GROUP, seed, position, continuation, inverse_temperature)
        # The lanes' lists are not in the order of the tokens.
        better = (noisy > best) | ((noisy == best) & (token < best_token))
        best, best_token = tl.where(better, noisy, best), tl.where(better, token, best_token)

    token = _best_token(best, best_token, n_cols)
    _advance(
        row, token, largest != largest,
        eos_ptr, token_ptr, position_ptr, slot_ptr, finished_ptr, sequence_ptr, seen_ptr,
        sequence_row_stride, seen_row_stride, n_slots, n_cols, pad_id, HAS_PENALTY, N_EOS,
    )  # fmt: skip
