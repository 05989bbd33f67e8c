"""The tokens of a request, chosen on the device: nothing in a step waits for the host, which looks one step behind.

A step is the same kernels on the same memory every time, and one CUDA graph replays them. What the steps of a model
work in is kept for its next call, unless it is large or the weights have changed since.
B batch, T slots of the cache, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from fastgpt_kernels.sampling_reference import Rows, SamplingOptions
from torch import Tensor

from .. import sampling
from ..modeling import GPT2LMHeadModel
from .cache import KVCache, prefill
from .generation import Request
from .weights import kernel_weights

TIERS = ("auto", "eager", "graph", "persistent")
_selected_tier = "auto"
# Caches up to this size, 1 GiB, stay for the next call of `generate()`, with room for the whole context.
_KEPT_CACHE_BYTES = 2**30


@contextmanager
def tier(name: str) -> Iterator[None]:
    """Decode on one tier inside the block, for measuring it.

    name: "eager" launches every kernel from the host, "graph" replays a CUDA graph of them, "persistent" does a step
    of one row in one kernel (also in a graph), "auto" is what is known to be the fastest.
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

    The device is one that kernels run on.
    """
    from fastgpt_kernels.fused.decode_step import DecodeStep

    weights = kernel_weights(model)
    if any(not parameter.is_contiguous() for parameter in model.parameters()):
        return "a parameter is not contiguous"
    if _selected_tier == "persistent":
        from fastgpt_kernels.fused.persistent_decode import PersistentDecoder

        wte, n_hidden = weights.wte, weights.layers[0].fc_weight.shape[1]
        shape = n_rows, wte.shape[1], weights.n_heads, n_hidden, weights.activation
        return PersistentDecoder.obstacle(*shape, wte.dtype, wte.device)
    return DecodeStep.obstacle(weights)


class Workspace:
    """The memory in which batches of one size decode with one model, and on a GPU the graph of a step in it.

    n_rows: B. n_slots: T of the cache.
    """

    def __init__(self, model: GPT2LMHeadModel, n_rows: int, n_slots: int):
        self.fingerprint, self.tier = fingerprint(model), _selected_tier
        self.n_rows, self.n_slots = n_rows, n_slots
        self.cache = KVCache.allocate(model, n_rows, n_slots)
        new = self.cache.memory.new_zeros
        self.tokens, self.positions, self.slots, self.starts = (new(n_rows, dtype=torch.int64) for _ in range(4))
        self.logits = new(n_rows, model.lm_head.out_features, dtype=torch.float32)
        self._step: Any = None
        self._graph: Any = None

    def serves(self, model: GPT2LMHeadModel, n_rows: int, n_slots: int) -> bool:
        """Whether it can be used again: it has the right size, and the weights are where and what they were."""
        fits = self.n_rows == n_rows and self.n_slots >= n_slots and self.tier == _selected_tier
        return fits and self.fingerprint == fingerprint(model)

    def decode(self, model: GPT2LMHeadModel) -> None:
        """Fill logits from tokens, positions, slots and starts, and append to the cache."""
        if self._graph is None and self._step is not None and self.logits.is_cuda and self.tier != "eager":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.logits.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch(model)
            self._graph = graph
        if self._graph is None:
            self._launch(model)  # which compiles the kernels that a graph holds
        else:
            self._graph.replay()

    def _launch(self, model: GPT2LMHeadModel) -> None:
        where = self.cache.memory, self.tokens, self.positions, self.slots, self.starts, self.logits
        if self.tier == "persistent":
            from fastgpt_kernels.fused.persistent_decode import PersistentDecoder

            self._step = self._step or PersistentDecoder(kernel_weights(model))
            self._step.decode(*where)
        else:
            from fastgpt_kernels.fused.decode_step import DecodeStep

            # It holds no weights: those of a model that moved away would stay on the GPU.
            weights = kernel_weights(model)
            self._step = self._step or DecodeStep(weights, self.n_rows, self.n_slots)
            self._step.decode(weights, *where)


def fingerprint(model: GPT2LMHeadModel) -> list[tuple[Any, ...]]:
    """Changes with every change of the model's weights, in place or not, that could make a graph or a copy stale."""
    # Tensors made in inference mode do not count their versions: they are taken to have changed.
    return [(p.data_ptr(), p.dtype, p.shape, object() if p.is_inference() else p._version) for p in model.parameters()]


_kept: WeakKeyDictionary[GPT2LMHeadModel, Workspace] = WeakKeyDictionary()


@contextmanager
def workspace(model: GPT2LMHeadModel, n_rows: int, n_slots: int) -> Iterator[Workspace]:
    """The workspace that is kept for a model if it serves, else a new one; no other call has it meanwhile."""
    taken = _kept.pop(model, None)
    if taken is None or not taken.serves(model, n_rows, n_slots):
        del taken
        n_context = max(n_slots, model.config.n_positions)
        n_bytes_of_slot = 2 * n_rows * model.config.n_layer * model.config.n_embd * model.dtype.itemsize
        taken = Workspace(model, n_rows, n_context if n_context * n_bytes_of_slot <= _KEPT_CACHE_BYTES else n_slots)
    try:
        yield taken
    finally:
        if taken.cache.memory.nbytes <= _KEPT_CACHE_BYTES:
            _kept[model] = taken


# --- tokens ---------------------------------------------------------------------------------------------------------


class _Arrival(NamedTuple):
    """Tokens (B,) on their way to the host."""

    tokens: Tensor
    event: Any

    @classmethod
    def of(cls, tokens: Tensor) -> "_Arrival":
        if not tokens.is_cuda:
            return cls(tokens.clone(), None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tokens.device))
        return cls(host, event)

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.tokens


class DeviceGeneration:
    """As `Generation`, with every token chosen by the sampling kernel: iterate over it, then read `sequences`.

    options: what `sampling.device_options` made of the request's processors.
    """

    def __init__(self, model: GPT2LMHeadModel, request: Request, options: SamplingOptions):
        self.model, self.request, self.options = model, request, options
        n_rows, n_prompt = request.ids.shape
        self.n_positions = model.transformer.wpe.num_embeddings
        first_position = int(request.positions[:, -1].max()) + 1
        # No row can go on when one has filled its context.
        self.n_most = min(request.max_length, n_prompt + 1 + max(0, self.n_positions - first_position))
        self._sequences = request.ids.new_empty(n_rows, self.n_most)
        self._sequences[:, :n_prompt] = request.ids
        self._end_tokens = None if request.eos_ids is None else request.eos_ids.cpu()
        self.n_tokens = n_prompt

    @property
    def sequences(self) -> Tensor:
        """(B, n_tokens): prompt and continuation."""
        return self._sequences[:, : self.n_tokens]

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,) on the host, until every row is finished.

        Raises ValueError when a row has filled its context, and on logits that are NaN.
        """
        with workspace(self.model, self.request.ids.shape[0], self.n_most - 1) as work:
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
        newest, n_chosen = _Arrival.of(rows.tokens), n_prompt + 1
        unfinished = torch.ones(len(rows.tokens), dtype=torch.bool)
        while newest is not None:
            following = None
            if n_chosen < self.n_most:
                # Before the newest tokens are looked at: the step after the last is wasted, and no other waits.
                work.decode(self.model)
                choose(work.logits)
                following, n_chosen = _Arrival.of(rows.tokens), n_chosen + 1
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
        """The state of the rows behind their prompts."""
        request, n_prompt = self.request, self.request.ids.shape[1]
        work.tokens.copy_(request.ids[:, -1])
        work.positions.copy_(request.positions[:, -1].expand_as(work.positions))
        work.slots.fill_(n_prompt - 1)
        work.starts.copy_(torch.zeros_like(work.starts) if request.mask is None else (request.mask == 0).sum(1))
        seen = sampling.seen_tokens(request.process, request.ids, work.logits.shape[1])
        finished = torch.zeros_like(work.tokens, dtype=torch.bool)
        return Rows(work.tokens, work.positions, work.slots, finished, self._sequences, seen)

    def _chooser(self, rows: Rows) -> Callable[[Tensor], None]:
        """What moves the rows on by one token, given logits (B, V)."""
        from fastgpt_kernels.fused.sampling import sample

        eos_ids, pad_id = self.request.eos_ids, self.request.pad_id
        return lambda logits: sample(logits, rows, self.options, eos_ids, pad_id)
