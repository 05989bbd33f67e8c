"""The workspace of decode steps on kernels: their memory, their CUDA graphs, and the tier on which they run.

Every step runs the same kernels on the same memory, so one CUDA graph replays them, and another the choice of the next
tokens. A graph fixes addresses, so the state of the rows is a part of the workspace, and every call copies its own
into it. B batch, T slots of the cache, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from fastgpt_kernels.common.decode_weights import DecodeWeights, RoundedMatrix
from fastgpt_kernels.common.dropout import seed_tensor
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from torch import Tensor
from transformers import GPT2LMHeadModel

import fastgpt.ops as ops

from .decoding import KVCache, view_weights
from .prompt_graphs import PromptGraphs
from .streams import OwnStream

TIERS = ("auto", "eager", "graph", "persistent")
_selected_tier = "auto"


@contextmanager
def tier(name: str) -> Iterator[None]:
    """Decode on one tier inside the block, in order to measure it.

    name: "eager" launches every kernel from the host, "graph" replays a CUDA graph of them, "persistent" runs a step of
    one row in one kernel (also in a graph), "auto" is the tier that is known to be the fastest.
    Raises ValueError on another name.
    """
    global _selected_tier
    if name not in TIERS:
        raise ValueError(f"unknown tier {name!r}: choose one of {', '.join(TIERS)}")
    previous, _selected_tier = _selected_tier, name
    try:
        yield
    finally:
        _selected_tier = previous


def obstacle(model: GPT2LMHeadModel, n_rows: int) -> str | None:
    """Why the kernels cannot decode with this model, whose modules are plain; None when they can.

    The model must be on a device where kernels run.
    """
    decode_step, persistent_decoder = _decoders()
    weights = view_weights(model)
    tensors = _tensors(weights)
    if not all(map(Tensor.is_contiguous, tensors)):
        return "a parameter is not contiguous"
    if any(map(Tensor.is_neg, tensors)):  # Its memory holds the values without their sign.
        return "a parameter has torch's negative bit"
    if _selected_tier == "persistent":
        wte, n_hidden = weights.wte, weights.layers[0].fc_weight.shape[1]
        shape = n_rows, wte.shape[1], weights.n_heads, n_hidden, weights.activation
        if isinstance(weights.layers[0].fc_weight, RoundedMatrix):
            return f"the persistent kernel reads no {weights.layers[0].fc_weight.kind} weights"
        return persistent_decoder.obstacle(*shape, wte.dtype, wte.device)
    return decode_step.obstacle(weights)


def _decoders():
    """The two classes that decode on kernels. Their modules import triton, which need not be installed."""
    from fastgpt_kernels.operations.decode_step.op import DecodeStep
    from fastgpt_kernels.operations.persistent_decode.op import PersistentDecoder

    return DecodeStep, PersistentDecoder


def sample(logits: Tensor, rows: Rows, options: SamplingOptions, eos_ids: Tensor | None, pad_id: int) -> None:
    """The operation `sample` on kernels, whose module imports triton too."""
    from fastgpt_kernels.operations.sampling import op

    op.sample(logits, rows, options, eos_ids, pad_id)


class Workspace:
    """The memory in which one model decodes batches of one size, and on a GPU the graphs of the steps.

    It keeps no weights, because they would stay on the GPU after the model has moved away.
    n_rows: B. n_slots: T of the cache. n_new: the most tokens of a row in a step; more than one only if B is 1.
    tokens, positions, slots, starts: (B * n_new,) int64, views of `state`. logits: (B * n_new, V). choices: of the next
    tokens, for one new token per row.
    """

    def __init__(self, model: GPT2LMHeadModel, weights: DecodeWeights, n_rows: int, n_slots: int, n_new: int = 1):
        self.fixed, self.tier = fixed_in_graphs(weights), _selected_tier
        self.n_rows, self.n_slots, self.n_new = n_rows, n_slots, n_new
        self.own_stream = OwnStream(model.device)
        with self.own_stream.inside():
            self.cache = KVCache.allocate(model, n_rows, n_slots)
            new_zeros = self.cache.memory.new_zeros
            self.state = new_zeros(4, n_rows * n_new, dtype=torch.int64)
            self.logits = new_zeros(n_rows * n_new, model.lm_head.out_features, dtype=torch.float32)
            records = self.own_stream.can_record and self.tier != "eager"
            self.choices = Choices(self.own_stream, self.state[:, :n_rows], n_slots, records)
        self.prompts = PromptGraphs(self.own_stream, self.cache, self.logits[:n_rows]) if records else None
        self.tokens, self.positions, self.slots, self.starts = self.state
        self._records = records
        # By the number of new tokens per row.
        self._steps: dict[int, Any] = {}
        self._replays: dict[int, Callable[[], None]] = {}

    def serves(self, n_rows: int, n_slots: int, n_new: int) -> bool:
        """Whether a call of this size on the selected tier can use it."""
        has_room = self.n_slots >= n_slots and self.n_new >= n_new
        return has_room and (self.n_rows, self.tier) == (n_rows, _selected_tier)

    @property
    def n_bytes(self) -> int:
        """Bytes of the cache, of copies of weights and of what graphs allocate."""
        copies = sum(getattr(step, "n_bytes", 0) for step in self._steps.values())
        return self.cache.memory.nbytes + copies + self.own_stream.n_bytes

    def refresh(self, weights: DecodeWeights) -> None:
        """Bring copies of the weights up to date, at the start of a call.

        Every time, because nothing reliable shows a change: fused optimizers and `.data` bypass autograd's version
        counters. A copy moves the bytes of the blocks twice, about as much as two tokens read.
        """
        if self.tier == "persistent" and 1 in self._steps:
            self._steps[1].pack(weights)

    def decode(self, weights: DecodeWeights, n_new: int = 1) -> None:
        """Fill the first n_rows * n_new logits from tokens, positions, slots and starts, and append to the cache."""
        self.own_stream.follow()
        replay = self._replays.get(n_new)
        if replay is None and n_new in self._steps and self._records:
            replay = self._replays[n_new] = self.own_stream.record(lambda: self._launch(weights, n_new))
        if replay is None:  # The first step is not captured: it compiles the kernels and allocates scratch memory.
            self._launch(weights, n_new)
        else:
            replay()

    def _launch(self, weights: DecodeWeights, n_new: int) -> None:
        rows = slice(self.n_rows * n_new)
        tokens, positions, slots, starts = self.state[:, rows]
        where = self.cache.memory, tokens, positions, slots, starts, self.logits[rows]
        if n_new not in self._steps:
            self._steps[n_new] = self._new_step(weights, n_new)
        if self._is_persistent(n_new):
            self._steps[n_new].decode(*where)
        else:
            self._steps[n_new].decode(weights, *where)

    def _new_step(self, weights: DecodeWeights, n_new: int) -> Any:
        """A step with its scratch memory, which belongs to the workspace's stream."""
        decode_step, persistent_decoder = _decoders()
        self.own_stream.wait_for_caller()
        with self.own_stream.inside():
            if self._is_persistent(n_new):
                step = persistent_decoder(weights)
            else:
                step = decode_step(weights, self.n_rows * n_new, self.n_slots, one_sequence=n_new > 1)
        self.own_stream.make_caller_wait()
        return step

    def _is_persistent(self, n_new: int) -> bool:
        return self.tier == "persistent" and n_new == 1


def fixed_in_graphs(weights: DecodeWeights) -> list[Any]:
    """What graphs fix about a model: the addresses, dtypes and shapes of its weights, and its constants.

    Not the values of the weights, which the kernels read in place every time. Also how operations and products are
    computed, for the whole process.
    """
    constants = [x for x in chain(weights, *weights.layers) if isinstance(x, float | int | str)]
    settings = ops.selected_backend(), torch.backends.cuda.matmul.fp32_precision
    tensors = _tensors(weights)
    return [constants, settings, *(list(map(read, tensors)) for read in _FIXED)]


_FIXED = Tensor.data_ptr, attrgetter("device"), attrgetter("dtype"), attrgetter("shape")


def _tensors(weights: DecodeWeights) -> list[Tensor]:
    held = chain(weights, *weights.layers)
    parts = chain.from_iterable(x if isinstance(x, RoundedMatrix) else (x,) for x in held)
    return [x for x in parts if isinstance(x, Tensor)]


# --- the choice that follows a step ---------------------------------------------------------------------------------

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
        """Take the rows of a new call.

        ids: (B, T), the prompts. end_tokens: the values of eos_ids, which the host would have to wait for. seen: (B, V)
        or None, as in `Rows`.
        """
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
