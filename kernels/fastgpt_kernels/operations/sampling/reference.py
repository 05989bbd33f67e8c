"""Sampling in plain torch: the specification that the kernels are tested against. The CPU path uses only its noise."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.dropout import philox, seed_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels count tokens in float32 and number them in int32.
MAX_VOCABULARY = 2**24
# Tells the noise of sampling from dropout under the same seed: the last word of Philox's counter.
SAMPLING_STREAM = 1


class Rows(NamedTuple):
    """The decoding state of every row of a batch, on the device; `sample` advances it by one token, in place."""

    tokens: Tensor  # (B,) int64, the newest token of each row: the input of the next step
    positions: Tensor  # (B,) int64, its position (padding not counted)
    slots: Tensor  # (B,) int64, its index in the row of `sequences` and its slot in the cache (padding counted)
    finished: Tensor  # (B,) bool, rows that met an end token
    sequences: Tensor  # (B, S) int64, prompt and continuation
    seen: Tensor | None  # (B, V) bool, tokens that a repetition penalty acts on; None where there is no penalty


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen. Values that describe no distribution raise ValueError.

    temperature: > 0. top_k: how many tokens to keep, 0 for all. top_p: probability to keep, in (0, 1]. min_p: least
    probability to keep, as a share of the largest, in [0, 1]. repetition_penalty: > 0, acts on `Rows.seen`. min_length:
    end tokens are barred while a row (padding counted) is shorter. seed: None takes the most likely token, whatever
    the first four are; 64 bits, or a tensor that holds them on the device, sample. n_continuations: row i
    continues prompt i // n_continuations, and noise tells those of one prompt apart by i % n_continuations.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_length: int = 0
    seed: int | Tensor | None = None
    n_continuations: int = 1

    def __post_init__(self) -> None:
        requirements = {
            "temperature": (0 < self.temperature < math.inf, "a finite number above 0"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            "min_length": (self.min_length >= 0, "0 or more"),
            "n_continuations": (self.n_continuations >= 1, "1 or more"),
            "seed": (_is_seed(self.seed), "an integer of 64 bits or an int64 tensor that holds one"),
        }
        for name, (is_met, requirement) in requirements.items():
            if not is_met:
                raise ValueError(f"{name} must be {requirement}, not {getattr(self, name)!r}")

    def filters(self, n_vocabulary: int) -> bool:
        """Whether any of the tokens may be left out before drawing."""
        return 0 < self.top_k < n_vocabulary or self.top_p < 1 or self.min_p > 0


def _is_seed(seed: int | Tensor | None) -> bool:
    if isinstance(seed, Tensor):
        return seed.numel() == 1 and seed.dtype == torch.int64
    return seed is None or (not isinstance(seed, bool) and -(2**63) <= seed < 2**64 and int(seed) == seed)


def sample(logits: Tensor, rows: Rows, options: SamplingOptions, eos_ids: Tensor | None, pad_id: int) -> None:
    """Choose the next token of every row and advance `rows` by it, in place.

    logits: (B, V) in float32, bfloat16 or float16, of any strides. rows: see `Rows`. eos_ids: (E,) int64, the end
    tokens. pad_id: the token of rows that are finished already.
    In this order: repetition penalty, end tokens barred, temperature, top-k, top-p, min-p; then the largest of the
    scores that are left, or with a seed of those plus `gumbel_noise`, which is a draw from their softmax. The token of
    the lowest index wins among equals. Where a row's logits hold a NaN its token is -1 and it is finished. An infinite
    logit counts as the largest float32. A token whose slot is outside `sequences` is not written.
    Raises ValueError when shapes, dtypes or devices do not fit.
    Source: transformers' logits processors; Gumbel's max trick.
    """
    check_sampling_arguments(logits, rows, options, eos_ids)
    scores = penalised_scores(logits, rows, options, eos_ids)
    if options.seed is not None:
        continuations = torch.arange(len(logits), device=logits.device) % options.n_continuations
        seed = seed_tensor(options.seed, logits.device)
        noise = gumbel_noise(seed, rows.positions + 1, continuations, logits.shape[1])
        noisy = scores / options.temperature + noise
        scores = noisy.masked_fill(~kept_tokens(scores, options), -math.inf)

    is_nan = logits.isnan().any(1)
    tokens = torch.where(is_nan, -1, scores.argmax(1))
    tokens = torch.where(rows.finished, pad_id, tokens)

    rows.finished.logical_or_(is_nan)
    if eos_ids is not None:
        rows.finished.logical_or_(torch.isin(tokens, eos_ids))
    rows.tokens.copy_(tokens)
    rows.positions.add_(1)
    rows.slots.add_(1)
    _write(rows.sequences, rows.slots, tokens)
    if rows.seen is not None:
        _write(rows.seen, tokens, torch.ones_like(rows.finished))


def _write(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """matrix[row, columns[row]] = values[row], but where the matrix has no such column. The host reads nothing."""
    n_columns = matrix.shape[1]
    if n_columns == 0:
        return
    places = columns.clamp(0, n_columns - 1)[:, None]
    matrix.scatter_(1, places, torch.where(columns[:, None] == places, values[:, None], matrix.gather(1, places)))


def penalised_scores(logits: Tensor, rows: Rows, options: SamplingOptions, eos_ids: Tensor | None) -> Tensor:
    """(B, V) in float32: logits behind the repetition penalty, with end tokens at -inf in rows that are too short."""
    scores = logits.float()
    if rows.seen is not None:
        penalty = options.repetition_penalty
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(rows.seen, penalised, scores)
    if eos_ids is not None:
        is_end = torch.isin(torch.arange(logits.shape[1], device=logits.device), eos_ids)
        scores = scores.masked_fill((rows.slots + 1 < options.min_length)[:, None] & is_end, -math.inf)
    return scores.clamp(max=torch.finfo(torch.float32).max)


def kept_tokens(scores: Tensor, options: SamplingOptions) -> Tensor:
    """(B, V) bool: what top-k, top-p and min-p leave of scores (B, V).

    Each keeps the scores above a threshold, so that equal scores stay or go together. For top-p, transformers cuts
    through equal scores in the order in which they were sorted.
    """
    kept = torch.ones_like(scores, dtype=torch.bool)
    if 0 < options.top_k < scores.shape[1]:
        kept = scores >= scores.topk(options.top_k).values[:, -1:]
    if options.top_p < 1:
        ordered, _ = scores.masked_fill(~kept, -math.inf).sort(descending=True)
        probabilities = (ordered / options.temperature).softmax(1)
        mass_above = probabilities.cumsum(1) - probabilities
        threshold = ordered.masked_fill(mass_above >= options.top_p, math.inf).amin(1, keepdim=True)
        kept = kept & (scores >= threshold)
    if options.min_p > 0:
        # Probabilities are to each other as exp of what their scores differ by, whatever the filters before left.
        below = (scores - scores.amax(1, keepdim=True)) / options.temperature
        kept = kept & (below >= math.log(options.min_p))
    return kept


def gumbel_noise(seed: Tensor, positions: Tensor, continuations: Tensor, n_tokens: int) -> Tensor:
    """(B, V) standard Gumbel noise in float32, a function of the arguments alone.

    seed: as `dropout.seed_tensor` gives it. positions: (B,), of the new tokens. continuations: (B,). n_tokens: V.
    """
    # One Philox call draws 32 bits for each of four tokens.
    groups = torch.arange(-(-n_tokens // 4), device=positions.device)[None]
    counter = [groups, positions[:, None], continuations[:, None], torch.full_like(groups, SAMPLING_STREAM)]
    return noise_of_words(torch.stack(philox(counter, seed), dim=-1).flatten(1)[:, :n_tokens])


def noise_of_words(words: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(u)) in float32 from u = (word + 1/2) / 2**32, for int64 words of 32 bits.

    The kernels take the same steps in the same order. Their noise differs from this by a few ulps, because a device has
    another logarithm and may round a product and a sum once. A draw differs where the two best of a row's noisy scores
    lie that close together: about one in a million.
    """
    # float32 has few numbers near 1, from where large noise comes: there, -log(u) is the series of v = 1 - u.
    u, v = ((x.float() + 0.5) * 2.0**-32 for x in (words, 0xFFFFFFFF - words))
    series = torch.full_like(v, 1 / 8)
    for i in range(7, 0, -1):
        series = series * v + 1 / i
    return -torch.where(v < 0.125, series * v, -u.log()).log()


def check_sampling_arguments(logits: Tensor, rows: Rows, options: SamplingOptions, eos_ids: Tensor | None) -> None:
    """Raise ValueError, naming what does not fit, on arguments that `sample` cannot take."""
    if logits.ndim != 2 or logits.dtype not in DTYPES or not 0 < logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"sample: logits must be (B, V) in {', '.join(map(str, DTYPES))}, with V from 1 to {MAX_VOCABULARY}, "
            f"not {tuple(logits.shape)} in {logits.dtype}"
        )
    if (rows.seen is None) != (options.repetition_penalty == 1.0):
        raise ValueError(
            f"sample: rows.seen must be there if and only if there is a penalty: it is "
            f"{'absent' if rows.seen is None else 'given'}, and the penalty {options.repetition_penalty}"
        )
    n_rows, n_vocabulary = logits.shape
    expected = {
        "tokens": (torch.int64, (n_rows,)),
        "positions": (torch.int64, (n_rows,)),
        "slots": (torch.int64, (n_rows,)),
        "finished": (torch.bool, (n_rows,)),
        "sequences": (torch.int64, (n_rows, rows.sequences.shape[-1])),
        "seen": (torch.bool, (n_rows, n_vocabulary)),
    }
    for name, tensor in rows._asdict().items():
        dtype, shape = expected[name]
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or tensor.stride(-1) != 1):
            raise ValueError(
                f"sample: rows.{name} must be {dtype} of shape {shape}, dense along its last axis, "
                f"not {tensor.dtype} of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    if eos_ids is not None and (eos_ids.dtype != torch.int64 or eos_ids.ndim != 1):
        raise ValueError(f"sample: eos_ids must be int64 of shape (E,), not {eos_ids.dtype} {tuple(eos_ids.shape)}")
    for tensor in (*rows, eos_ids):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"sample: all tensors must be on {logits.device}, not on {tensor.device}")
