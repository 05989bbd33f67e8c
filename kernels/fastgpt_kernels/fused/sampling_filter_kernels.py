"""The kernel that chooses a row's token where top-k, top-p or min-p leave tokens out.

From the best score of every group of 16 tokens it bounds from below what is kept, gathers the few groups that can hold
a kept token, and looks at their scores alone: all 50,257 would not fit into its registers.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# Triton declares compile-time parameters as constexpr, a type that no literal has, and tensors as what they are not.

import triton
import triton.language as tl

from .sampling_kernels import GROUP_SIZE, _add_noise, _advance, _best_token, _load_scores, _mass

_GROUP = tl.constexpr(GROUP_SIZE)


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
        # Each thread sums its own scores: what crosses warps waits for them all, and is done once a round.
        sums = tl.zeros((WAYS, BLOCK), dtype=tl.float32)
        for start in range(0, n_scores, BLOCK):
            # This way round a thread holds its scores once, and compares them with all thresholds.
            index = start + tl.arange(0, BLOCK)[None, :]
            score = tl.load(score_ptr + index, mask=index < n_scores, other=float("-inf"))
            weight = _mass(score, largest, inverse_temperature) if BY_MASS else tl.full((1, BLOCK), 1.0, tl.float32)
            sums += tl.where(_key(score) >= thresholds[:, None], weight, 0.0)
        weights = tl.sum(sums, axis=1)
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
