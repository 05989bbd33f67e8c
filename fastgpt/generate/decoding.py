"""The parts of the engine: a static cache that a prompt fills through the model's own blocks, the views of the model's
weights that decode steps read, and the decode step in torch.

B batch, N new tokens per row, T slots of the cache, L layers, H heads, D head size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.decode_weights import DecodeLayer, DecodeWeights, Matrix
from fastgpt_kernels.operations.decode_step import reference
from torch import Tensor
from transformers import Cache, DynamicCache, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer

from ..model.attention import nothing_hidden
from ..model.blocks import GPT2Block
from ..model.checks import check_token_ids
from ..model.compat import CACHE
from ..model.plain import fused_activation
from ..model.rounded import RoundedLinear
from ..model.twin import converted
from .products import has_memory_for, is_slow

P = ParamSpec("P")
R = TypeVar("R")


def without_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function or generator run without gradients and outside inference mode, whatever its caller's mode.

    A tensor allocated in inference mode cannot be written to outside it, and the engine writes to its tensors in later
    steps and calls.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


@dataclass
class KVCache:
    """Keys and values of every layer, allocated once.

    memory: (L, 2, B, H, T, D), keys before values; the first n_tokens of T are filled.
    attention_bias: (B, 1, 1, T), added to the scores: -inf at padding, 0 elsewhere; None where there is no padding.
    """

    memory: Tensor
    attention_bias: Tensor | None = None
    n_tokens: int = 0

    @classmethod
    def allocate(cls, model: GPT2LMHeadModel, n_rows: int, n_slots: int) -> "KVCache":
        config, wte = model.config, model.transformer.wte.weight
        shape = config.n_layer, 2, n_rows, config.n_head, n_slots, config.n_embd // config.n_head
        return cls(wte.new_empty(shape))

    def copy_to(self, cache: DynamicCache, dtype: torch.dtype) -> None:
        """Copy the filled slots into an empty cache of transformers, in a dtype."""
        for layer, (keys, values) in enumerate(self.memory[..., : self.n_tokens, :].to(dtype)):
            cache.update(keys, values, layer)


class _PromptLayer(DynamicLayer):
    """A layer of transformers' cache that stores the prompt's keys and values in a KVCache."""

    def __init__(self, memory: Tensor):
        super().__init__()
        self.memory = memory  # (2, B, H, T, D)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.memory[..., : key_states.shape[-2], :]
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        self.is_initialized = True
        return self.keys, self.values


def prefill(model: GPT2LMHeadModel, cache: KVCache, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Run a prompt through the model's own blocks and keep its keys and values.

    ids: (B, T). mask: (B, T), 0 at padding, which is on the left; None without padding. positions: (B, T) or (1, T).
    Fills the empty cache. Returns logits (B, V) of the next token. Raises as the model's forward does, and on a GPU too
    ValueError on an id outside the vocabulary.
    """
    check_token_ids(ids, model.transformer.wte.num_embeddings, may_wait=True)
    logits = forward_prompt(model, cache, ids, mask, positions)
    cache.n_tokens = ids.shape[1]
    if mask is not None:
        padding = F.pad(mask == 0, (0, cache.memory.shape[-2] - ids.shape[1]))  # (B, T)
        bias = cache.memory.new_zeros(padding.shape).masked_fill_(padding, -torch.inf)
        cache.attention_bias = bias[:, None, None, :]
        # Padding may have left NaN here, and an attention weight of zero times NaN is NaN.
        cache.memory.masked_fill_(padding[:, None, :, None], 0.0)
    return logits


def forward_prompt(
    model: GPT2LMHeadModel, cache: KVCache, ids: Tensor, mask: Tensor | None, positions: Tensor, last: int | Tensor = 1
) -> Tensor:
    """The model's forward of a prompt, whose keys and values go into the first slots of the cache.

    Without a mask, nothing in it waits for a GPU, so that a CUDA graph can capture it. last: 1, or (1,) int64, the
    index of the last token where padding follows it. Returns its logits (B, V). The rest as for `prefill`.
    """
    past = Cache(layers=[_PromptLayer(memory) for memory in cache.memory])
    mask = nothing_hidden(model.transformer.wte.weight) if mask is None else mask
    inputs = {"attention_mask": mask, "position_ids": positions, CACHE: past}
    return model(ids, **inputs, use_cache=True, logits_to_keep=last).logits[:, -1]


def decode_one_token(
    weights: DecodeWeights,
    cache: KVCache,
    tokens: Tensor,
    positions: Tensor,
    multiply: Callable[[Tensor, Matrix, Tensor | None], Tensor] = reference.multiply,
) -> Tensor:
    """`decode_tokens` for one token per row. tokens: (B,). positions: (B,) or (1,). Returns logits (B, V)."""
    return decode_tokens(weights, cache, tokens[:, None], positions[:, None], multiply)[:, 0]


def decode_tokens(
    weights: DecodeWeights,
    cache: KVCache,
    tokens: Tensor,
    positions: Tensor,
    multiply: Callable[[Tensor, Matrix, Tensor | None], Tensor] = reference.multiply,
) -> Tensor:
    """Run N new tokens per row in torch and append their keys and values to the cache.

    tokens: (B, N). positions: (B, N) or (1, N). multiply: computes the product of rows and a matrix, with a bias.
    Returns logits (B, N, V): what follows each new token.
    """
    memory, n_past, bias = cache.memory, cache.n_tokens, cache.attention_bias
    logits = reference.decode_tokens(weights, memory, n_past, tokens, positions, bias, multiply)
    cache.n_tokens += tokens.shape[1]
    return logits


# --- the weights ----------------------------------------------------------------------------------------------------


def in_fast_dtype(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model, which `routing` found plain, or for one call its copy in float32, where the CPU is slow in its dtype.

    The results are then those of float32 from the same weights: closer to the truth than those of half precision.
    """
    weight = model.transformer.wte.weight
    if weight.device.type != "cpu" or not is_slow(weight.dtype):
        return model
    n_bytes = sum(parameter.numel() for parameter in model.parameters()) * torch.float32.itemsize
    return converted(model, torch.float32) if has_memory_for(n_bytes) else model


def view_weights(model: GPT2LMHeadModel) -> DecodeWeights:
    """A view of a model whose modules `routing` found plain: its own tensors, so that decoding sees changes in them."""
    body = model.transformer
    blocks: list[GPT2Block] = list(body.h)  # type: ignore[arg-type]
    return DecodeWeights(
        wte=body.wte.weight,
        wpe=body.wpe.weight,
        layers=tuple(_view_layer(block) for block in blocks),
        ln_f_weight=body.ln_f.weight,
        ln_f_bias=body.ln_f.bias,
        head=model.lm_head.matrix if isinstance(model.lm_head, RoundedLinear) else model.lm_head.weight,
        eps=body.ln_f.eps,
        n_heads=model.config.n_head,
        activation=str(fused_activation(blocks[0].mlp.act)),
    )


def _view_layer(block: GPT2Block) -> DecodeLayer:
    # From the modules' own tables, because finding attributes of modules takes the host longer than a decode step does.
    parts: Any = block._modules
    attn, mlp = parts["attn"], parts["mlp"]
    modules = parts["ln_1"], attn._modules["c_attn"], attn._modules["c_proj"]
    modules = *modules, parts["ln_2"], mlp._modules["c_fc"], mlp._modules["c_proj"]
    ln_1, qkv, proj, ln_2, fc, mlp_proj = map(_weight_and_bias, modules)
    return DecodeLayer(*ln_1, *qkv, attn.scaling, *proj, *ln_2, *fc, *mlp_proj)


def _weight_and_bias(module: Any) -> tuple[Any, Any]:
    table = module._parameters
    return module.matrix if isinstance(module, RoundedLinear) else table["weight"], table["bias"]
