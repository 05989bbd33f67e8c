"""Generation over a static cache: the prompt through the model's own blocks, then one small forward per token.

`prefill` and `decode_one_token` are all that knows the device; the loop around them only chooses tokens.
`routing` says which calls of `generate()` come here.
Shapes: B batch, T slots of the cache, L layers, H heads, D head size, C channels, F hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastgpt_kernels.reference import ACTIVATIONS
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from .modeling import GPT2Block, GPT2LMHeadModel, fused_activation

# --- weights --------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """weight, bias: (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Product(NamedTuple):
    """weight: (in, out), as Conv1D stores it. bias: (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class RowProduct(Product):
    """A product of one row. weight: (out, in), a copy."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmv(self.bias, self.weight, x[0])[None]


class Layer(NamedTuple):
    """The weights of one block, in the order in which they are used."""

    ln_1: Norm
    qkv: Product
    scale: float
    attn_proj: Product
    ln_2: Norm
    fc: Product
    activation: Callable[[Tensor], Tensor]
    mlp_proj: Product


class Weights(NamedTuple):
    """A view of a model: its own tensors, so that a change in them is seen. wte (V, C), wpe (P, C), head (V, C)."""

    wte: Tensor
    wpe: Tensor
    layers: list[Layer]
    ln_f: Norm
    head: Tensor
    n_heads: int


def view_weights(model: GPT2LMHeadModel, *, copy_for_one_row: bool = False) -> Weights:
    """The weights of a model whose modules `routing` found plain.

    copy_for_one_row: hold the products of the blocks as `RowProduct`; the copies are as large as the blocks' weights.
    """
    body, product = model.transformer, _copied_product if copy_for_one_row else _product
    layers = [_view_layer(block, product) for block in body.h]  # type: ignore[arg-type]
    return Weights(
        body.wte.weight, body.wpe.weight, layers, _norm(body.ln_f), model.lm_head.weight, model.config.n_head
    )


def _view_layer(block: GPT2Block, product: Callable[[Conv1D], Product]) -> Layer:
    attn, mlp = block.attn, block.mlp
    return Layer(
        ln_1=_norm(block.ln_1),
        qkv=product(attn.c_attn),
        scale=attn.scaling,
        attn_proj=product(attn.c_proj),
        ln_2=_norm(block.ln_2),
        fc=product(mlp.c_fc),
        activation=ACTIVATIONS[str(fused_activation(mlp.act))],
        mlp_proj=product(mlp.c_proj),
    )


def _product(module: Conv1D) -> Product:
    return Product(module.weight, module.bias)


def _copied_product(module: Conv1D) -> Product:
    return RowProduct(module.weight.t().contiguous(), module.bias)


def _norm(module: torch.nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


# --- cache ----------------------------------------------------------------------------------------------------------


@dataclass
class KVCache:
    """Keys and values of every layer, allocated once.

    memory: (L, 2, B, H, T, D), keys before values; the first n_tokens of T are filled.
    hidden: (B, 1, 1, T), what is added to the scores: -inf at padding, 0 elsewhere; None where there is no padding.
    """

    memory: Tensor
    hidden: Tensor | None = None
    n_tokens: int = 0

    @classmethod
    def allocate(cls, weights: Weights, n_rows: int, n_slots: int) -> "KVCache":
        n_channels = weights.wte.shape[1]
        shape = len(weights.layers), 2, n_rows, weights.n_heads, n_slots, n_channels // weights.n_heads
        return cls(weights.wte.new_empty(shape))

    def copy_to(self, cache: DynamicCache) -> None:
        """Append what is filled to an empty cache of transformers'."""
        for layer, (keys, values) in enumerate(self.memory[..., : self.n_tokens, :]):
            cache.update(keys, values, layer)


class _PromptLayer(DynamicLayer):
    """A layer of transformers' cache that writes the prompt into a KVCache and gives it back from there."""

    def __init__(self, memory: Tensor):
        super().__init__()
        self.memory = memory  # (2, B, H, T, D)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.memory[..., : key_states.shape[-2], :]
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        self.is_initialized = True
        return self.keys, self.values


# --- forward --------------------------------------------------------------------------------------------------------


def prefill(model: GPT2LMHeadModel, cache: KVCache, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Run a prompt through the model's own blocks and keep its keys and values.

    ids: (B, T). mask: (B, T), 0 at the padding on the left; None when there is none. positions: (B, T) or (1, T).
    Fills the empty cache. Returns logits (B, V) of what follows. Raises as the model's forward does.
    """
    past = Cache(layers=[_PromptLayer(memory) for memory in cache.memory])
    outputs = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True, logits_to_keep=1
    )
    cache.n_tokens = ids.shape[1]
    if mask is not None:
        padding = F.pad(mask == 0, (0, cache.memory.shape[-2] - ids.shape[1]))  # (B, T)
        cache.hidden = cache.memory.new_zeros(padding.shape).masked_fill_(padding, -torch.inf)[:, None, None, :]
        # A weight of zero would not silence a NaN that padding may have left.
        cache.memory.masked_fill_(padding[:, None, :, None], 0.0)
    return outputs.logits[:, -1]


@torch.inference_mode()
def decode_one_token(weights: Weights, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """The forward of one token per row over the cache, to which its keys and values are appended.

    tokens: (B,). positions: (B,) or (1,). Returns logits (B, V).
    """
    here = cache.n_tokens
    filled = slice(here + 1)
    hidden = None if cache.hidden is None else cache.hidden[..., filled]
    head_shape = tokens.shape[0], 3, weights.n_heads, -1

    x = F.embedding(tokens, weights.wte) + F.embedding(positions, weights.wpe)  # (B, C)
    for layer, memory in zip(weights.layers, cache.memory, strict=True):
        qkv = layer.qkv(layer.ln_1(x)).view(head_shape)  # (B, 3, H, D)
        memory[..., here, :] = qkv[:, 1:].transpose(0, 1)
        keys, values = memory[..., filled, :]  # each (B, H, T, D)
        attended = F.scaled_dot_product_attention(qkv[:, 0, :, None], keys, values, attn_mask=hidden, scale=layer.scale)
        x += layer.attn_proj(attended.reshape(x.shape))
        x += layer.mlp_proj(layer.activation(layer.fc(layer.ln_2(x))))
    cache.n_tokens = here + 1
    return _head(weights.ln_f(x), weights.head)


def _head(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T. x: (B, C). weight: (V, C)."""
    n_rows = x.shape[0]
    if x.device.type == "cpu" and n_rows == 1:
        return torch.mv(weight, x[0])[None]  # 1.5 times faster in bfloat16, the same in float32
    if x.device.type == "cpu" and n_rows >= 8:
        return torch.mm(weight, x.t()).t()  # 1.6 times faster in both, but slower below 8 rows in float32
    return F.linear(x, weight)


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One call of `generate()`, as transformers prepared it.

    ids, mask, positions: as `prefill` takes them. process: what changes the logits. max_length: of a row, its prompt
    and padding included. eos_ids: None or (n,), after which a row is filled with pad_id.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    process: LogitsProcessorList
    do_sample: bool
    max_length: int
    eos_ids: Tensor | None = None
    pad_id: int = 0


# On a CPU torch multiplies one bfloat16 row by the rows of a matrix 1.2 to 1.9 times faster than by its columns;
# copying the weights takes as long as that saves in ten to twenty steps.
_MIN_STEPS_FOR_COPIES = 32


class Generation:
    """The tokens of one request as they come: iterate over it, then read `sequences` and `cache`."""

    def __init__(self, model: GPT2LMHeadModel, request: Request):
        self.model, self.request = model, request
        n_rows, n_prompt = request.ids.shape
        self.n_positions = model.transformer.wpe.num_embeddings
        self.next_position = int(request.positions[:, -1].max()) + 1
        # The last token needs no slot, and no row can go on when one has filled its context.
        n_slots = min(request.max_length - 1, n_prompt + max(0, self.n_positions - self.next_position))
        copies_pay = model.device.type == "cpu" and model.dtype == torch.bfloat16 and n_rows == 1
        copies_pay = copies_pay and n_slots - n_prompt >= _MIN_STEPS_FOR_COPIES
        self.weights = view_weights(model, copy_for_one_row=copies_pay)
        self.cache = KVCache.allocate(self.weights, n_rows, n_slots)
        self._sequences = request.ids.new_empty(n_rows, n_slots + 1)
        self._sequences[:, :n_prompt] = request.ids
        self.n_tokens = n_prompt

    @property
    def sequences(self) -> Tensor:
        """(B, n_tokens): prompt and continuation."""
        return self._sequences[:, : self.n_tokens]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,), until every row is finished.

        Raises ValueError when a row has filled its context.
        """
        request = self.request
        logits = prefill(self.model, self.cache, request.ids, request.mask, request.positions)
        positions = request.positions[:, -1]
        unfinished = request.ids.new_ones(request.ids.shape[0], dtype=torch.bool)
        while True:
            tokens = choose(request, self.sequences, logits)
            if request.eos_ids is not None:
                tokens = tokens.where(unfinished, request.pad_id)
                unfinished = unfinished & ~torch.isin(tokens, request.eos_ids)
            newest = self._sequences[:, self.n_tokens]
            newest.copy_(tokens)
            self.n_tokens += 1
            yield newest
            if self.n_tokens >= request.max_length or (request.eos_ids is not None and not unfinished.any()):
                return
            if self.next_position >= self.n_positions:
                raise ValueError(
                    f"position {self.next_position} is outside the context: n_positions is {self.n_positions}"
                )
            positions = positions + 1
            logits = decode_one_token(self.weights, self.cache, newest, positions)
            self.next_position += 1


@torch.inference_mode()
def choose(request: Request, sequences: Tensor, logits: Tensor) -> Tensor:
    """The next token (B,) from logits (B, V): the most likely one, or a draw from torch's generator."""
    scores = request.process(sequences, logits.float())  # type: ignore[arg-type]
    if request.do_sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)
