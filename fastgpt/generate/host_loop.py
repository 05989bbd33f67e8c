"""Generation on the CPU path: the host chooses each token with transformers' own logits processors.

B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastgpt_kernels.common.decode_weights import DecodeWeights
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel, LogitsProcessorList

from ..model.checks import check_positions, context_is_full
from ..model.rounded import RoundedLinear
from .copies import Copies
from .decoding import KVCache, decode_one_token, in_fast_dtype, prefill, view_weights, without_autograd
from .products import Products


@dataclass(frozen=True)
class Request:
    """One call of `generate()`, as transformers prepared it.

    ids, mask, positions: as for `prefill`. processors: change the logits. max_length: tokens of a row, including its
    prompt and padding. eos_ids: None or (n,); after one of them, pad_id fills the row. past: an empty cache that
    receives the keys and values of all tokens but the last.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    processors: LogitsProcessorList
    do_sample: bool
    max_length: int
    eos_ids: Tensor | None = None
    pad_id: int = 0
    past: DynamicCache | None = None

    def longest(self, n_positions: int) -> int:
        """The most tokens of a row: max_length, or fewer, because all rows stop when one has filled its context.

        Raises ValueError on a prompt that does not fit. On a GPU its forward would end in an assertion of torch, and
        with it all use of the GPU in this process.
        """
        check_positions(self.positions, n_positions, may_wait=True)
        last_position = int(self.positions[:, -1].max())
        return min(self.max_length, self.ids.shape[1] + max(1, n_positions - last_position))


class Generation:
    """The tokens of one request, one step at a time: iterate over it, then read `sequences`."""

    @without_autograd
    def __init__(self, model: GPT2LMHeadModel, request: Request):
        self.model, self.request = model, request
        n_rows, n_prompt = request.ids.shape
        self.n_positions = model.transformer.wpe.num_embeddings
        self.cache: KVCache  # from the first token on
        self._sequences = request.ids.new_empty(n_rows, request.longest(self.n_positions))
        self._sequences[:, :n_prompt] = request.ids
        self._unfinished = request.ids.new_ones(n_rows, dtype=torch.bool)
        self.n_tokens = n_prompt

    @property
    def sequences(self) -> Tensor:
        """(B, n_tokens): prompt and continuation."""
        return self._sequences[:, : self.n_tokens]

    @without_autograd
    def __iter__(self) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,), until every row is finished.

        Raises ValueError when a row has filled its context.
        """
        # Only here, because the weights may change between `stream()` and the request for the first token.
        model = in_fast_dtype(self.model)
        n_rows, n_slots = len(self._sequences), self._sequences.shape[1] - 1  # the last token needs no slot
        self.cache = KVCache.allocate(model, n_rows, n_slots)
        yield from self._generate(model)
        if self.request.past is not None:
            self.cache.copy_to(self.request.past, self.model.dtype)

    def _generate(self, model: GPT2LMHeadModel) -> Iterator[Tensor]:
        request = self.request
        yield self._append(prefill(model, self.cache, request.ids, request.mask, request.positions))
        weights = view_weights(model)
        # After the first token, because choosing the implementation of a product takes time.
        products = self._products(weights, len(request.ids))
        while self._goes_on():
            newest = self._sequences[:, self.n_tokens - 1]
            yield self._append(decode_one_token(weights, self.cache, newest, self._positions(1)[:, 0], products))

    def _products(self, weights: DecodeWeights, n_rows: int) -> Products:
        """Those of the steps to come."""
        product: Any = self.model.transformer.h[0].mlp.c_fc  # type: ignore[union-attr]
        rounds = isinstance(product, RoundedLinear) and product.rounds_input
        precision = torch.int8 if rounds else self.model.dtype
        # Weights of another dtype than the model's live for this call alone.
        copies = Copies(self.model if weights.wte.dtype == self.model.dtype else None)
        return Products(weights, n_rows, self._n_free, precision, copies)

    @property
    def _n_free(self) -> int:
        """How many tokens of a row may still come."""
        return self._sequences.shape[1] - self.n_tokens

    def _append(self, logits: Tensor) -> Tensor:
        """Choose the next token of every row from logits (B, V). Returns the tokens (B,)."""
        tokens, eos_ids = choose(self.request, self.sequences, logits), self.request.eos_ids
        if eos_ids is not None:
            tokens = tokens.where(self._unfinished, self.request.pad_id)
            self._unfinished &= ~torch.isin(tokens, eos_ids)
        newest = self._sequences[:, self.n_tokens]
        newest.copy_(tokens)
        self.n_tokens += 1
        return newest.clone()  # A copy, because the caller may write to it.

    def _goes_on(self) -> bool:
        """Whether a row needs another token. Raises ValueError when it does and has filled its context."""
        ended = self.request.eos_ids is not None and not self._unfinished.any()
        if ended or self.n_tokens >= self.request.max_length:
            return False
        if self.n_tokens == self._sequences.shape[1]:
            raise context_is_full(self.n_positions)
        return True

    def _positions(self, n_new: int) -> Tensor:
        """(B, N) or (1, N): of the newest token and the N - 1 tokens after it."""
        first = self.n_tokens - self.request.ids.shape[1]
        return self.request.positions[:, -1:] + torch.arange(first, first + n_new, device=self.request.ids.device)


@torch.inference_mode()
def choose(request: Request, sequences: Tensor, logits: Tensor) -> Tensor:
    """The next token (B,) from logits (B, V): the most likely one, or a draw from torch's generator."""
    scores = request.processors(sequences, logits.float())  # type: ignore[arg-type]
    if request.do_sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)
