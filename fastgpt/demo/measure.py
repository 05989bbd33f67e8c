"""What a run of the recipe measured, and a bigram model, whose loss on the same tokens is for comparison.

A text is `ids` (n + 1,) int64: an end-of-text token and n tokens, which are all predicted. V is the vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    training: str
    validation: str
    held_out: str


@dataclass(frozen=True)
class Outcome:
    """What a run measured. Losses are in nats per token of the held-out part; n_tokens is the number for each part."""

    parts: Parts
    n_tokens: tuple[int, ...]
    best_step: int
    training_s: float
    model_loss: float
    model_bits_per_byte: float
    bigram_loss: float
    bigram_bits_per_byte: float
    bigram_strength: float


class Bigram:
    """Counted pairs of tokens, smoothed by the unigram: p(b | a) = (n(a, b) + strength p(b)) / (n(a) + strength)."""

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        tokens = ids[1:]
        # Add one to each count, so that no token has probability 0.
        self.unigram = (tokens.bincount(minlength=vocab_size) + 1).double() / (len(tokens) + vocab_size)  # (V,)
        self.context_counts = ids[:-1].bincount(minlength=vocab_size)  # (V,)
        self.pairs, self.pair_counts = torch.unique(self._pairs(ids), return_counts=True)

    def _pairs(self, ids: Tensor) -> Tensor:
        return ids[:-1] * self.vocab_size + ids[1:]

    def loss(self, ids: Tensor, strength: float) -> float:
        """The bigram's mean negative log-likelihood of ids[1:], in nats per token. strength: > 0, in counts."""
        pairs = self._pairs(ids)
        index = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
        counts = torch.where(self.pairs[index] == pairs, self.pair_counts[index], 0)
        p = (counts + strength * self.unigram[ids[1:]]) / (self.context_counts[ids[:-1]] + strength)
        return -p.log().mean().item()

    def best_strength(self, ids: Tensor) -> float:
        """The strength with the lowest loss on ids, among 2**(i/4) from 2**-4 to 2**16."""
        return min((2 ** (i / 4) for i in range(-16, 65)), key=lambda strength: self.loss(ids, strength))
