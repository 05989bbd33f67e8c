"""Several tokens from one forward, without a draft model: what followed the newest tokens before is proposed again.

One forward gives the logits behind every proposed token. The tokens are then chosen from them one after the other, as
they would be without proposals, and as long as the choice is what was proposed, the next logits hold.
N proposed tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..modeling import GPT2LMHeadModel
from .cache import prefill
from .generation import Generation, Request
from .step import decode_tokens

# Runs of this length or shorter are looked up, unless `max_matching_ngram_size` says another.
LONGEST_LOOKUP = 3


class NGramIndex:
    """Where each run of one to n_longest tokens was last followed by another token.

    n_longest: the longest run that is looked up.
    """

    def __init__(self, n_longest: int):
        self.n_longest = n_longest
        self.tokens: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the sequence."""
        for token in tokens:
            for run in self._newest_runs():
                self._followed_at[run] = len(self.tokens)
            self.tokens.append(token)

    def propose(self, n_most: int) -> list[int]:
        """What followed the longest known run at the end of the sequence, up to n_most tokens; [] where none is known.

        Past the end of the sequence the proposal goes on with itself, so that a short period is proposed many times.
        """
        start = next((self._followed_at[run] for run in self._newest_runs() if run in self._followed_at), None)
        if start is None:
            return []
        known = self.tokens[start:]
        return [known[number % len(known)] for number in range(n_most)]

    def _newest_runs(self) -> Iterator[tuple[int, ...]]:
        """The runs that end the sequence, longest first."""
        for length in range(min(self.n_longest, len(self.tokens)), 0, -1):
            yield tuple(self.tokens[-length:])


class LookupGeneration(Generation):
    """As `Generation`, for one row, with up to n_proposed tokens verified by each forward."""

    def __init__(self, model: GPT2LMHeadModel, request: Request, n_proposed: int, n_longest: int):
        super().__init__(model, request)
        self.n_proposed = n_proposed
        self.index = NGramIndex(n_longest)
        self.index.extend(request.ids[0].tolist())

    def _generate(self) -> Iterator[Tensor]:
        request = self.request
        yield self._append(prefill(self.model, self.cache, request.ids, request.mask, request.positions))
        while self._goes_on():
            n_free = self._sequences.shape[1] - self.n_tokens
            proposed = self.index.propose(min(self.n_proposed, n_free - 1))
            tokens = torch.tensor([[self.index.tokens[-1], *proposed]], device=request.ids.device)
            logits = decode_tokens(self.weights, self.cache, tokens, self._positions(1 + len(proposed)))
            for number in range(1 + len(proposed)):
                yield self._append(logits[:, number])
                held = proposed[number : number + 1] == self.index.tokens[-1:]
                if not (held and self._goes_on()):
                    break
            # What was computed behind a token that did not hold is overwritten.
            self.cache.n_tokens = self.n_tokens - 1

    def _append(self, logits: Tensor) -> Tensor:
        newest = super()._append(logits)
        self.index.extend(newest.tolist())
        return newest
