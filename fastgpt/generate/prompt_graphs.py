"""CUDA graphs of prompts, one for each of a few lengths: a prompt is padded on the right to the next of them.

Attention is causal, so no token of a prompt sees the padding behind it: keys, values and logits are what they are
without padding. The slots of the cache that padding fills are read by nobody before decode steps fill them again.
B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from ..model.checks import check_token_ids
from .decoding import KVCache, forward_prompt
from .streams import OwnStream

_SHORTEST = 16


def padded_length(n_tokens: int, n_most: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96 and so on, at most n_most. From 16 on, this adds less than half."""
    power = max(_SHORTEST, 1 << (n_tokens - 1).bit_length())
    between = power * 3 // 4
    return min(between if between >= _SHORTEST and n_tokens <= between else power, n_most)


# What a host takes to launch a layer, and what a data center's GPU computes in large products: expected and not
# measured. They say where padding begins to cost more than launches do.
_HOST_S_PER_LAYER = 300e-6
_FLOP_PER_S = {2: 500e12, 4: 50e12}  # by the bytes of an element


def hides_its_launches(memory: Tensor, n_tokens: int) -> bool:
    """Whether a GPU computes a forward of B * T tokens for longer than a host launches it: no graph makes it faster.

    memory: of the cache. n_tokens: T.
    """
    _, _, n_rows, n_heads, _, head_dim = memory.shape
    flop_per_layer = 24 * n_rows * n_tokens * (n_heads * head_dim) ** 2
    return flop_per_layer > _HOST_S_PER_LAYER * _FLOP_PER_S[memory.itemsize]


class PromptGraphs:
    """Fills the cache of a workspace with prompts that have no padding of their own.

    The first prompt of a length runs without a graph, so that its kernels are compiled; the second one records.
    """

    def __init__(self, own_stream: OwnStream, cache: KVCache, logits: Tensor):
        """logits: (B, V), where those of the next token go."""
        self._own_stream, self._cache, self._logits = own_stream, cache, logits
        _, _, self._n_rows, _, self._n_slots, _ = cache.memory.shape
        with own_stream.inside():
            self._inputs = logits.new_zeros(2, self._n_rows * self._n_slots, dtype=torch.int64)
            self._last = self._inputs.new_zeros(1)
        # By length; None where kernels are compiled and nothing is recorded yet.
        self._replays: dict[int, Callable[[], None] | None] = {}

    def fill(self, model: GPT2LMHeadModel, ids: Tensor, positions: Tensor) -> bool:
        """Run a prompt as `prefill` does, and tell whether it was run: not where no graph makes it faster.

        ids: (B, T). positions: (B, T) or (1, T). Fills the empty cache and the logits. Raises ValueError on an id
        outside the vocabulary.
        """
        n_tokens = ids.shape[1]
        n_padded = padded_length(n_tokens, self._n_slots)
        if hides_its_launches(self._cache.memory, n_padded):
            return False
        check_token_ids(ids, model.transformer.wte.num_embeddings, may_wait=True)
        inputs = self._inputs[:, : self._n_rows * n_padded].view(2, self._n_rows, n_padded)
        for padded, given in zip(inputs, (ids, positions), strict=True):
            padded[:, :n_tokens] = given
            # The last token again: another one might have weights that are NaN, which causal attention multiplies by 0.
            padded[:, n_tokens:] = given[:, -1:]
        self._last.fill_(n_tokens - 1)
        padded_ids, padded_positions = inputs

        def run() -> None:
            self._logits.copy_(forward_prompt(model, self._cache, padded_ids, None, padded_positions, self._last))

        replay = self._replays.get(n_padded)
        if replay is None and n_padded in self._replays:
            replay = self._replays[n_padded] = self._own_stream.record(run)
        if replay is None:
            run()
            self._replays[n_padded] = None
        else:
            replay()
        self._cache.n_tokens = n_tokens
        return True
