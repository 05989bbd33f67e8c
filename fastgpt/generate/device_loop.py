"""Generation on kernels: the device chooses each token, and the host reads the tokens one step behind.

B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from fastgpt_kernels.common.decode_weights import DecodeWeights
from fastgpt_kernels.operations.sampling.reference import SamplingOptions
from torch import Tensor
from transformers import GPT2LMHeadModel

from ..model.checks import context_is_full
from .decoding import prefill, view_weights, without_autograd
from .host_loop import Request
from .kept import with_room, workspace
from .options import NAN_LOGITS, seen_tokens
from .workspace import Workspace


class DeviceGeneration:
    """Like `Generation`, but the sampling kernel chooses every token: iterate over it, then read `sequences`.

    options: the request's processors as `options.device_options` translates them.
    """

    n_new = 1  # most tokens of a row in a step

    @without_autograd
    def __init__(self, model: GPT2LMHeadModel, request: Request, options: SamplingOptions):
        self.model, self.request, self.options = model, request, options
        self.n_positions = model.transformer.wpe.num_embeddings
        self.n_most = request.longest(self.n_positions)
        self._end_tokens = () if request.eos_ids is None else tuple(request.eos_ids.tolist())
        self.n_tokens = request.ids.shape[1]

    @property
    def sequences(self) -> Tensor:
        """(B, n_tokens): prompt and continuation, when the iteration has ended."""
        return self._sequences

    @without_autograd
    def __iter__(self) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,) on the host, until every row is finished.

        Raises ValueError when a row has filled its context, and on logits that are NaN.
        """
        weights = view_weights(self.model)
        with workspace(self.model, weights, self.request.ids.shape[0], self.n_most - 1, self.n_new) as work:
            yield from self._generate(work, weights)
            # The next call will use this memory.
            self._sequences = work.choices.rows.sequences[:, : self.n_tokens].clone()
            if self.request.past is not None:
                work.cache.n_tokens = self.n_tokens - 1
                work.cache.copy_to(self.request.past, self.model.dtype)

    def _generate(self, work: Workspace, weights: DecodeWeights) -> Iterator[Tensor]:
        request, n_prompt = self.request, self.request.ids.shape[1]
        self._prefill(work)
        self._start(work)
        choices, copies = work.choices, HostCopies(work.choices.rows.tokens)
        logits = work.logits[: len(request.ids)]
        seen = seen_tokens(request.processors, request.ids, work.logits.shape[1])
        choices.begin(request.ids, self.options, request.eos_ids, self._end_tokens, request.pad_id, seen)
        choices.append_after_step(logits)
        newest, n_chosen = copies.start(), n_prompt + 1
        unfinished = set(range(len(request.ids)))
        while newest is not None:
            following = None
            if n_chosen < self.n_most:
                # Launch the next step before reading these tokens. It costs one wasted step at the end.
                work.decode(weights)
                choices.append_after_step(logits)
                following, n_chosen = copies.start(), n_chosen + 1
            tokens = copies.wait(newest)
            values = tokens.tolist()
            if min(values) < 0:
                raise ValueError(NAN_LOGITS)
            self.n_tokens += 1
            yield tokens
            if self._end_tokens:
                unfinished -= {row for row, token in enumerate(values) if token in self._end_tokens}
                if not unfinished:
                    return
            newest = following
        if self.n_tokens < request.max_length:
            raise context_is_full(self.n_positions)

    def _prefill(self, work: Workspace) -> None:
        """Fill the cache with the prompt, and the first B logits with those of the first new token."""
        model, request = self.model, self.request
        mask = None if request.mask is None or request.mask.all() else request.mask
        graphs = work.prompts if mask is None else None

        def fill() -> None:
            if graphs is None or not graphs.fill(model, request.ids, request.positions):
                logits = prefill(model, work.cache, request.ids, mask, request.positions)
                work.logits[: len(logits)].copy_(logits)

        with_room(fill)

    def _start(self, work: Workspace) -> None:
        """Set the input of the first step, but for its tokens."""
        request, n_prompt = self.request, self.request.ids.shape[1]
        work.tokens.copy_(request.ids[:, -1])
        work.positions.copy_(request.positions[:, -1].expand_as(work.positions))
        work.slots.fill_(n_prompt - 1)
        work.starts.copy_(torch.zeros_like(work.starts) if request.mask is None else (request.mask == 0).sum(1))


class HostCopies:
    """Copies of tokens (B,) to the host, asynchronous on a GPU and at most two in flight."""

    def __init__(self, tokens: Tensor):
        self._tokens, self._n_started = tokens, 0
        self._slots = torch.empty(2, len(tokens), dtype=tokens.dtype, device="cpu", pin_memory=tokens.is_cuda)
        self._events: Any = [torch.cuda.Event(), torch.cuda.Event()] if tokens.is_cuda else None

    def start(self) -> int:
        """Start to copy the tokens as they are now. Returns the number of the copy."""
        number, self._n_started = self._n_started, self._n_started + 1
        self._slots[number % 2].copy_(self._tokens, non_blocking=True)
        if self._events is not None:
            self._events[number % 2].record(torch.cuda.current_stream(self._tokens.device))
        return number

    def wait(self, number: int) -> Tensor:
        """Wait for one of the last two copies. Returns its tokens, in ordinary memory."""
        if self._events is not None:
            self._events[number % 2].synchronize()
        return self._slots[number % 2].clone()
