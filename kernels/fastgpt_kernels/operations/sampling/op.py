"""Sampling on the device: the public function and its launcher."""

import math

import torch
from torch import Tensor

from ...common import chip
from ...common.dropout import seed_tensor
from ...common.launch import as_rows, launch
from . import tiles
from .filter_kernels import TOKENS_OF_LANE, _sampling_filtered_choice_kernel
from .kernels import GROUP_SIZE, _sampling_choice_kernel, _sampling_groups_kernel
from .reference import DTYPES, Rows, SamplingOptions, check_sampling_arguments


def sample(logits: Tensor, rows: Rows, options: SamplingOptions, eos_ids: Tensor | None, pad_id: int) -> None:
    """Choose the next token of every row and advance `rows` by it, in place and without waiting for the device.

    logits: (B, V) in float32, bfloat16 or float16; logits whose last axis is not dense are copied. The rest as in
    `reference.sample`. An integer seed is copied to the device at every call; a tensor on the device
    (`dropout.seed_tensor`) is used directly. Temperatures are clamped to [1e-30, 1e30].
    Raises ValueError when shapes, dtypes or devices do not fit.
    Source: `reference.sample`.
    """
    check_sampling_arguments(logits, rows, options, eos_ids)
    sample_fwd(logits, rows, options, eos_ids, pad_id)


def supports(logits: Tensor) -> bool:
    """Whether the kernels take logits of this dtype."""
    return logits.dtype in DTYPES


def sample_fwd(
    logits: Tensor, rows: Rows, options: SamplingOptions, eos_ids: Tensor | None, pad_id: int
) -> Tensor | None:
    """`sample` without checks. Returns the lowest score that filters keep, (B,), or None without filters."""
    if logits.shape[0] == 0:
        return None
    logits = as_rows(logits.resolve_neg())
    n_rows, n_cols = logits.shape
    n_groups = -(-n_cols // GROUP_SIZE)
    samples = options.seed is not None
    filters = samples and options.filters(n_cols)
    has_top_k = 0 < options.top_k < n_cols
    has_top_p = options.top_p < 1
    seed = seed_tensor(options.seed, logits.device) if samples else None
    temperature = min(max(options.temperature, 1e-30), 1e30)
    eos_ids = None if eos_ids is None or eos_ids.numel() == 0 else eos_ids.contiguous()

    group_scores = logits.new_empty((n_rows, n_groups), dtype=torch.float32)
    group_tokens = logits.new_empty((n_rows, n_groups), dtype=torch.int32)
    group_masses = torch.empty_like(group_scores) if filters and has_top_p and not has_top_k else None
    scoring = {
        "logits_row_stride": logits.stride(0), "penalty": float(options.repetition_penalty),
        "inverse_temperature": 1 / temperature, "min_length": options.min_length,
        "n_continuations": options.n_continuations,
    }  # fmt: skip
    shared = {
        "seen_row_stride": 0 if rows.seen is None else rows.seen.stride(0), "n_cols": n_cols, "n_groups": n_groups,
        "N_EOS": 0 if eos_ids is None else eos_ids.numel(), "HAS_PENALTY": rows.seen is not None,
    }  # fmt: skip
    launch(
        _sampling_groups_kernel, n_rows * -(-n_groups // tiles.SAMPLING_GROUPS),
        logits, rows.seen, eos_ids, None if filters else seed, rows.positions, rows.slots,
        group_scores, group_tokens, group_masses,
        **scoring, **shared, BLOCK_GROUPS=tiles.SAMPLING_GROUPS,
        HAS_NOISE=samples and not filters, HAS_MASS=group_masses is not None, num_warps=tiles.SAMPLING_GROUPS_WARPS,
    )  # fmt: skip

    state = eos_ids, rows.tokens, rows.positions, rows.slots, rows.finished, rows.sequences, rows.seen
    advancing = {
        "sequence_row_stride": rows.sequences.stride(0), "n_slots": rows.sequences.shape[1], "pad_id": pad_id,
    }  # fmt: skip
    if not filters:
        launch(
            _sampling_choice_kernel, n_rows, group_scores, group_tokens, *state, **shared, **advancing,
            BLOCK=tiles.sampling_choice_block(chip.architecture(logits.device)),
            num_warps=tiles.SAMPLING_CHOICE_WARPS,
        )  # fmt: skip
        return None
    lanes = tiles.SAMPLING_FILTER_LANES
    n_places = -(-n_groups * GROUP_SIZE // (lanes * TOKENS_OF_LANE)) * lanes * TOKENS_OF_LANE
    scores = logits.new_empty((n_rows, 3, n_places), dtype=torch.float32)
    indices = logits.new_empty((n_rows, 2, n_places), dtype=torch.int32)
    thresholds = logits.new_empty(n_rows, dtype=torch.float32)
    launch(
        _sampling_filtered_choice_kernel, n_rows,
        # The filtering kernel does not need the groups' tokens; their memory holds its list of groups.
        group_scores, group_tokens, group_masses, logits, scores, indices, thresholds, seed, *state,
        **scoring, **shared, **advancing,
        n_places=n_places, top_k=options.top_k, top_p=float(options.top_p),
        # Twice the number of tokens, which leaves room for rounding in the sums.
        top_p_reach=temperature * math.log((1 - options.top_p) / (2 * n_cols)) if has_top_p else 0.0,
        min_p_reach=temperature * math.log(options.min_p) if options.min_p > 0 else -math.inf,
        LANES=lanes, WAYS=tiles.SAMPLING_WAYS, HAS_TOP_K=has_top_k, HAS_TOP_P=has_top_p,
        num_warps=tiles.SAMPLING_FILTER_WARPS,
        **tiles.sampling_filter_registers(chip.architecture(logits.device)),
    )  # fmt: skip
    return thresholds


__all__ = ["Rows", "SamplingOptions", "sample", "supports"]
