"""Prompt lookup, which is speculative decoding without a draft model: propose what followed the newest tokens before.

One forward gives the logits after every proposed token. Tokens are then chosen one after the other, as they would be
without proposals. As long as the chosen token equals the proposed one, the logits after it are valid.
N proposed tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from fastgpt_kernels.common.decode_weights import DecodeWeights
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from torch import Tensor
from transformers import GPT2LMHeadModel

from ..model.checks import context_is_full
from .decoding import decode_tokens, prefill, view_weights
from .device_loop import DeviceGeneration, HostCopies
from .host_loop import Generation, Request
from .options import NAN_LOGITS
from .workspace import Workspace, sample

# The longest run of tokens that is looked up, unless `max_matching_ngram_size` is given.
LONGEST_LOOKUP = 3
# A program of the attention kernel holds the keys of all new tokens of a step.
_MOST_PROPOSED_ON_DEVICE = 31


class NGramIndex:
    """Where each run of 1 to n_longest tokens occurred last with a token after it.

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
        """Up to n_most tokens that followed the longest known run at the sequence's end; [] if no run is known.

        A proposal that reaches the end of the sequence continues with itself, so a short period repeats.
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
    """Like `Generation`, for one row: each forward verifies up to n_proposed tokens."""

    def __init__(self, model: GPT2LMHeadModel, request: Request, n_proposed: int, n_longest: int):
        super().__init__(model, request)
        self.n_proposed = n_proposed
        self.index = NGramIndex(n_longest)
        self.index.extend(request.ids[0].tolist())

    def _generate(self, model: GPT2LMHeadModel) -> Iterator[Tensor]:
        request, weights = self.request, view_weights(model)
        yield self._append(prefill(model, self.cache, request.ids, request.mask, request.positions))
        products = self._products(weights, 1 + self.n_proposed)
        while self._goes_on():
            proposed = self.index.propose(min(self.n_proposed, self._n_free - 1))
            tokens = torch.tensor([[self.index.tokens[-1], *proposed]], device=request.ids.device)
            logits = decode_tokens(weights, self.cache, tokens, self._positions(1 + len(proposed)), products)
            for number in range(1 + len(proposed)):
                yield self._append(logits[:, number])
                held = proposed[number : number + 1] == self.index.tokens[-1:]
                if not (held and self._goes_on()):
                    break
            # Drop the slots after a rejected token: the next step overwrites them.
            self.cache.n_tokens = self.n_tokens - 1

    def _append(self, logits: Tensor) -> Tensor:
        newest = super()._append(logits)
        self.index.extend(newest.tolist())
        return newest


class DeviceLookupGeneration(DeviceGeneration):
    """Like `LookupGeneration`, on the kernels: one graph for steps with proposals, one for steps without.

    The host reads the tokens of every step, because the next proposals depend on them. options: no repetition penalty.
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

    def _generate(self, work: Workspace, weights: DecodeWeights) -> Iterator[Tensor]:
        self._prefill(work)
        self._start(work)
        yield self._append(self._choose(work, work.logits[:1])[0])
        while self._goes_on():
            proposed = self.index.propose(min(self.n_new, self.n_most - self.n_tokens) - 1)
            n_new = self.n_new if proposed else 1
            self._feed(work, proposed + [0] * (n_new - 1 - len(proposed)))
            work.decode(weights, n_new)
            for number, token in enumerate(self._choose(work, work.logits[:n_new])):
                yield self._append(token)
                if proposed[number : number + 1] != [token] or not self._goes_on():
                    break

    def _feed(self, work: Workspace, proposed: list[int]) -> None:
        """Copy the newest token and the proposed ones, with their positions and slots, into the input of the step."""
        tokens, n_past = [self.index.tokens[-1], *proposed], self.n_tokens - 1
        first_position = self._last_position + self.n_tokens - self.request.ids.shape[1]
        ranges = [range(first, first + len(tokens)) for first in (first_position, n_past)]
        state = torch.tensor([tokens, *map(list, ranges)], device="cpu", pin_memory=work.state.is_cuda)
        work.state[:3, : len(tokens)].copy_(state, non_blocking=True)

    def _choose(self, work: Workspace, logits: Tensor) -> list[int]:
        """The tokens chosen after each of the n tokens of a step, given logits (n, V)."""
        tokens, positions, slots, _ = work.state[:, : len(logits)]
        finished = torch.zeros_like(tokens, dtype=torch.bool)
        rows = Rows(tokens, positions, slots, finished, sequences=tokens.new_empty(len(tokens), 0), seen=None)
        sample(logits, rows, self.options, self.request.eos_ids, self.request.pad_id)
        copies = HostCopies(tokens)
        return copies.wait(copies.start()).tolist()

    def _append(self, token: int) -> Tensor:
        if token < 0:
            raise ValueError(NAN_LOGITS)
        self.index.extend([token])
        self.n_tokens += 1
        return torch.tensor([token], device="cpu")

    def _goes_on(self) -> bool:
        """Whether the row needs another token. Raises ValueError when it does and its context is full."""
        ended = self.index.tokens[-1] in self._end_tokens
        if ended or self.n_tokens >= self.request.max_length:
            return False
        if self.n_tokens == self.n_most:
            raise context_is_full(self.n_positions)
        return True
