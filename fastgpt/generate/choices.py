"""What follows a decode step on kernels: the choice of the next tokens, replayed as a CUDA graph, and their way to the
host.

A graph fixes places in memory, so the state of the rows has a place of its own in the workspace and every call copies
its own into it. B batch, S tokens of a sequence, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from fastgpt_kernels.common.dropout import seed_tensor
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from torch import Tensor

from .streams import OwnStream

# Graphs of the choices asked for last: other options are other numbers in a graph.
_KEPT_GRAPHS = 8


class Choice(NamedTuple):
    """How tokens are chosen: what a graph of the choice fixes. options: without their seed, which may vary."""

    options: SamplingOptions
    samples: bool
    end_tokens: tuple[int, ...]
    pad_id: int
    has_penalty: bool


class Replay(NamedTuple):
    """A recorded choice, and the tensor that its graph reads besides those of the workspace."""

    run: Callable[[], None]
    eos_ids: Tensor | None


class Choices:
    """Appends one token to every row from the logits of a step, on memory that stays where it is.

    rows: the state, of which tokens, positions and slots are the inputs of the next step.
    """

    def __init__(self, own_stream: OwnStream, state: Tensor, n_slots: int, records: bool):
        """state: (4, B), as a workspace's. records: whether choices are recorded in CUDA graphs."""
        self._own_stream, self._records = own_stream, records
        tokens, positions, slots, _ = state
        finished = torch.zeros_like(tokens, dtype=torch.bool)
        self.rows = Rows(tokens, positions, slots, finished, tokens.new_zeros(len(tokens), n_slots + 1), None)
        self._seed = tokens.new_zeros(1)
        self._seen: Tensor | None = None
        # None for a choice that was made once, so that its kernels are compiled.
        self._replays: OrderedDict[Choice, Replay | None] = OrderedDict()

    def begin(
        self,
        ids: Tensor,
        options: SamplingOptions,
        eos_ids: Tensor | None,
        end_tokens: tuple[int, ...],
        pad_id: int,
        seen: Tensor | None,
    ) -> None:
        """Take the rows of a new call. ids: (B, T), the prompts. end_tokens: what eos_ids holds, for which the host
        would have to wait. seen: (B, V) or None, as in `Rows`."""
        self._options, self._eos_ids = options, eos_ids
        if options.seed is not None:
            self._seed.copy_(seed_tensor(options.seed, ids.device).view(1))
            self._options = replace(options, seed=self._seed)
        self._choice = Choice(
            replace(options, seed=None), options.seed is not None, end_tokens, pad_id, seen is not None
        )
        if seen is not None:
            if self._seen is None:
                with self._own_stream.inside():
                    self._seen = torch.empty_like(seen)
            self._seen.copy_(seen)
        self.rows = self.rows._replace(seen=None if seen is None else self._seen)
        self.rows.finished.zero_()
        self.rows.sequences[:, : ids.shape[1]] = ids

    def append(self, logits: Tensor) -> None:
        """Choose the tokens that follow logits (B, V) and append them."""
        from fastgpt_kernels.operations.sampling.op import sample

        sample(logits, self.rows, self._options, self._eos_ids, self._choice.pad_id)

    def append_after_step(self, logits: Tensor) -> None:
        """`append` for the logits of a decode step, which lie in the same memory every time."""
        is_compiled = self._choice in self._replays
        replay = self._replays.pop(self._choice, None)
        if replay is None and is_compiled and self._records:
            replay = Replay(self._own_stream.record(lambda: self.append(logits)), self._eos_ids)
        if replay is None:
            self.append(logits)
        else:
            replay.run()
        self._replays[self._choice] = replay
        if len(self._replays) > _KEPT_GRAPHS:
            self._replays.popitem(last=False)


class Mailbox:
    """Brings tokens (B,) to the host in the order in which they were sent, up to two at a time on their way."""

    def __init__(self, tokens: Tensor):
        self._tokens, self._n_sent = tokens, 0
        self._slots = torch.empty(2, len(tokens), dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        self._events: Any = [torch.cuda.Event(), torch.cuda.Event()] if tokens.is_cuda else None

    def send(self) -> int:
        """Start to copy the tokens as they are now, and return the number of the letter."""
        number, self._n_sent = self._n_sent, self._n_sent + 1
        self._slots[number % 2].copy_(self._tokens, non_blocking=True)
        if self._events is not None:
            self._events[number % 2].record(torch.cuda.current_stream(self._tokens.device))
        return number

    def read(self, number: int) -> Tensor:
        """Wait for the tokens of a letter, one of the last two. Returns them in ordinary memory."""
        if self._events is not None:
            self._events[number % 2].synchronize()
        return self._slots[number % 2].clone()
