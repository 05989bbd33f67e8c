"""Several tokens from one forward, without a draft model: what followed the newest tokens before is proposed again.

One forward gives the logits behind every proposed token. The tokens are then chosen from them one after the other, as
they would be without proposals, and as long as the choice is what was proposed, the next logits hold.
N proposed tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from torch import Tensor
from transformers import GPT2LMHeadModel

from . import options as sampling
from .cache import prefill
from .device_loop import Arrival, DeviceGeneration
from .host_loop import Generation, Request
from .step import decode_tokens
from .weights import Weights
from .workspace import Workspace

# Runs of this length or shorter are looked up, unless `max_matching_ngram_size` says another.
LONGEST_LOOKUP = 3
# A program of the kernels holds the keys of all new tokens of a step.
_MOST_PROPOSED_ON_DEVICE = 31


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

    def _generate(self, weights: Weights) -> Iterator[Tensor]:
        request = self.request
        yield self._append(prefill(self.model, self.cache, request.ids, request.mask, request.positions))
        while self._goes_on():
            n_free = self._sequences.shape[1] - self.n_tokens
            proposed = self.index.propose(min(self.n_proposed, n_free - 1))
            tokens = torch.tensor([[self.index.tokens[-1], *proposed]], device=request.ids.device)
            logits = decode_tokens(weights, self.cache, tokens, self._positions(1 + len(proposed)))
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


class DeviceLookupGeneration(DeviceGeneration):
    """As `LookupGeneration`, on the kernels: one graph for a step with proposals, and one for a step without.

    The host reads the tokens of every step, since the next proposals depend on them. options: no repetition penalty.
    """

    def __init__(
        self, model: GPT2LMHeadModel, request: Request, options: SamplingOptions, n_proposed: int, n_longest: int
    ):
        super().__init__(model, request, options)
        self.n_new = 1 + min(n_proposed, _MOST_PROPOSED_ON_DEVICE)
        self._last_position = int(request.positions[0, -1])  # of the prompt
        self.index = NGramIndex(n_longest)
        self.index.extend(request.ids[0].tolist())

    @property
    def sequences(self) -> Tensor:
        return torch.tensor([self.index.tokens], device=self.request.ids.device)

    def _generate(self, work: Workspace) -> Iterator[Tensor]:
        request = self.request
        logits = prefill(self.model, work.cache, request.ids, request.mask, request.positions)
        self._start(work)
        yield self._append(self._choose(work, logits)[0])
        while self._goes_on():
            proposed = self.index.propose(min(self.n_new, self.n_most - self.n_tokens) - 1)
            n_new = self.n_new if proposed else 1
            self._feed(work, proposed + [0] * (n_new - 1 - len(proposed)))
            work.decode(self.model, n_new)
            for number, token in enumerate(self._choose(work, work.logits[:n_new])):
                yield self._append(token)
                if proposed[number : number + 1] != [token] or not self._goes_on():
                    break

    def _feed(self, work: Workspace, proposed: list[int]) -> None:
        """Make the newest token and proposed ones, in the slots that follow each other, what goes into the step."""
        tokens, n_past = [self.index.tokens[-1], *proposed], self.n_tokens - 1
        first_position = self._last_position + self.n_tokens - self.request.ids.shape[1]
        places = [range(first, first + len(tokens)) for first in (first_position, n_past)]
        state = torch.tensor([tokens, *map(list, places)], pin_memory=work.state.is_cuda)
        work.state[:3, : len(tokens)].copy_(state, non_blocking=True)

    def _choose(self, work: Workspace, logits: Tensor) -> list[int]:
        """What follows each of the n tokens of a step, given logits (n, V)."""
        tokens, positions, slots, _ = work.state[:, : len(logits)]
        finished = torch.zeros_like(tokens, dtype=torch.bool)
        rows = Rows(tokens, positions, slots, finished, sequences=tokens.new_empty(len(tokens), 0), seen=None)
        self._chooser(rows)(logits)
        return Arrival.of(tokens).wait().tolist()

    def _append(self, token: int) -> Tensor:
        if token < 0:
            raise ValueError(sampling.NAN_LOGITS)
        self.index.extend([token])
        self.n_tokens += 1
        return torch.tensor([token])

    def _goes_on(self) -> bool:
        """Whether another token is wanted. Raises ValueError when it is and the context is full."""
        ended = self._end_tokens is not None and self.index.tokens[-1] in self._end_tokens
        if ended or self.n_tokens >= self.request.max_length:
            return False
        if self.n_tokens == self.n_most:
            raise ValueError(f"position {self.n_positions} is outside the context: n_positions is {self.n_positions}")
        return True
