"""Generation on kernels: the device chooses each token, and the host reads the tokens one step behind.

B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from torch import Tensor
from transformers import GPT2LMHeadModel

from . import options as sampling
from .cache import prefill, without_autograd
from .host_loop import Request
from .workspace import Workspace, workspace


class Arrival(NamedTuple):
    """Tokens (B,) that are being copied to the host."""

    tokens: Tensor
    event: Any

    @classmethod
    def of(cls, tokens: Tensor) -> "Arrival":
        if not tokens.is_cuda:
            return cls(tokens.clone(), None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tokens.device))
        return cls(host, event)

    def wait(self) -> Tensor:
        """The tokens in ordinary memory, so that torch can reuse the pinned memory."""
        if self.event is None:
            return self.tokens
        self.event.synchronize()
        return self.tokens.clone()


class DeviceGeneration:
    """Like `Generation`, but the sampling kernel chooses every token: iterate over it, then read `sequences`.

    options: the request's processors as `sampling.device_options` translates them.
    """

    n_new = 1  # most tokens of a row in a step

    @without_autograd
    def __init__(self, model: GPT2LMHeadModel, request: Request, options: SamplingOptions):
        self.model, self.request, self.options = model, request, options
        n_rows, n_prompt = request.ids.shape
        self.n_positions = model.transformer.wpe.num_embeddings
        self.n_most = request.longest(self.n_positions)
        self._sequences = request.ids.new_empty(n_rows, self.n_most)
        self._sequences[:, :n_prompt] = request.ids
        self._end_tokens = None if request.eos_ids is None else request.eos_ids.cpu()
        self.n_tokens = n_prompt

    @property
    def sequences(self) -> Tensor:
        """(B, n_tokens): prompt and continuation."""
        return self._sequences[:, : self.n_tokens]

    @without_autograd
    def __iter__(self) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,) on the host, until every row is finished.

        Raises ValueError when a row has filled its context, and on logits that are NaN.
        """
        with workspace(self.model, self.request.ids.shape[0], self.n_most - 1, self.n_new) as work:
            yield from self._generate(work)
            if self.request.past is not None:
                work.cache.n_tokens = self.n_tokens - 1
                work.cache.copy_to(self.request.past)

    def _generate(self, work: Workspace) -> Iterator[Tensor]:
        request, n_prompt = self.request, self.request.ids.shape[1]
        logits = prefill(self.model, work.cache, request.ids, request.mask, request.positions)
        rows = self._start(work)
        choose = self._chooser(rows)
        choose(logits)
        newest, n_chosen = Arrival.of(rows.tokens), n_prompt + 1
        unfinished = torch.ones(len(rows.tokens), dtype=torch.bool)
        while newest is not None:
            following = None
            if n_chosen < self.n_most:
                # Launch the next step before reading these tokens. It costs one wasted step at the end.
                work.decode(self.model)
                choose(work.logits)
                following, n_chosen = Arrival.of(rows.tokens), n_chosen + 1
            tokens = newest.wait()
            if bool((tokens < 0).any()):
                raise ValueError(sampling.NAN_LOGITS)
            self.n_tokens += 1
            yield tokens
            if self._end_tokens is not None:
                unfinished &= ~torch.isin(tokens, self._end_tokens)
                if not unfinished.any():
                    return
            newest = following
        if self.n_tokens < request.max_length:
            raise ValueError(f"position {self.n_positions} is outside the context: n_positions is {self.n_positions}")

    def _start(self, work: Workspace) -> Rows:
        """The state of the rows after their prompts."""
        request, n_prompt = self.request, self.request.ids.shape[1]
        work.tokens.copy_(request.ids[:, -1])
        work.positions.copy_(request.positions[:, -1].expand_as(work.positions))
        work.slots.fill_(n_prompt - 1)
        work.starts.copy_(torch.zeros_like(work.starts) if request.mask is None else (request.mask == 0).sum(1))
        seen = sampling.seen_tokens(request.processors, request.ids, work.logits.shape[1])
        finished = torch.zeros_like(work.tokens, dtype=torch.bool)
        return Rows(work.tokens, work.positions, work.slots, finished, self._sequences, seen)

    def _chooser(self, rows: Rows) -> Callable[[Tensor], None]:
        """A function that appends one token to every row, given logits (B, V)."""
        from fastgpt_kernels.operations.sampling.op import sample

        eos_ids, pad_id = self.request.eos_ids, self.request.pad_id
        return lambda logits: sample(logits, rows, self.options, eos_ids, pad_id)
