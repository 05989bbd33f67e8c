"""Decoders of small models of transformers, and prompts to decode behind.

Every program is a thread of `cooperative_grid`. Scratch memory starts as NaN, and so do all slots of the cache that
hold no key: behind the last one, and before the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from fastgpt_kernels.common.decode_weights import DecodeLayer, DecodeWeights
from fastgpt_kernels.operations.persistent_decode import tiles
from fastgpt_kernels.operations.persistent_decode.op import PersistentDecoder
from interpreter import DEVICE, INTERPRETING
from interpreter.cooperative import cooperative_grid
from models import pair, tiny_config
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from fastgpt.model.compat import CACHE

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF] if INTERPRETING else HALF
SHIPPED = tiles.PersistentRing(4, 8, 6)
# In the interpreter time goes with the number of tiles.
LARGE_TILES = SHIPPED._replace(groups=16)
HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 20, 1600: 25}


@contextmanager
def tuned(n_programs: int, ring: tiles.PersistentRing = LARGE_TILES) -> Iterator[None]:
    """Another number of programs and other tiles; on a GPU, those of the GPU."""
    if not INTERPRETING:
        yield
        return
    with mock.patch.multiple(tiles, _PERSISTENT_PROGRAMS_OF_CPU=n_programs, _PERSISTENT_RING=ring):
        yield


def small_config(n_channels: int = 128, **changes: Any) -> GPT2Config:
    return tiny_config(n_embd=n_channels, n_head=n_channels // 64, **({"n_positions": 256} | changes))


def make_model(config: GPT2Config, dtype: torch.dtype) -> GPT2LMHeadModel:
    """transformers' own."""
    return pair(config)[0].to(DEVICE, dtype)


def weights_of(model: Any) -> DecodeWeights:
    config, body = model.config, model.transformer
    layers = []
    for i, block in enumerate(body.h):
        ln_1, attn, ln_2, mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        scale = 0.125 / (i + 1 if config.scale_attn_by_inverse_layer_idx else 1)
        before = ln_1.weight, ln_1.bias, attn.c_attn.weight, attn.c_attn.bias, scale
        behind = attn.c_proj.weight, attn.c_proj.bias, ln_2.weight, ln_2.bias
        layers.append(DecodeLayer(*before, *behind, mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias))
    return DecodeWeights(
        wte=body.wte.weight,
        wpe=body.wpe.weight,
        layers=tuple(layers),
        ln_f_weight=body.ln_f.weight,
        ln_f_bias=body.ln_f.bias,
        head=model.lm_head.weight,
        eps=config.layer_norm_epsilon,
        n_heads=config.n_head,
        activation=config.activation_function,
    )


def make_decoder(model: Any) -> PersistentDecoder:
    decoder = PersistentDecoder(weights_of(model))
    for scratch in decoder._scratch:
        scratch.fill_(torch.nan)
    return decoder


def integer(value: int) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def decode(
    decoder: PersistentDecoder,
    cache: Tensor,
    token: int,
    position: int,
    slot: int,
    start: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Logits (1, V)."""
    logits = torch.full((1, decoder._sizes["n_vocab"]), torch.nan, device=DEVICE)
    starts = None if start is None else integer(start)
    with cooperative_grid(seed):
        decoder.decode(cache, integer(token), integer(position), integer(slot), starts, logits)
    return logits


class Prompt(NamedTuple):
    """A prompt that a model has read, in a cache as the decoder takes it and in one of transformers'."""

    cache: Tensor
    past: DynamicCache


def read_prompt(model: Any, ids: Tensor, n_slots: int, start: int = 0) -> Prompt:
    """ids: (1, T), into slots start .. start + T - 1; the others are NaN."""
    config, past = model.config, DynamicCache(config=model.config)
    shape = config.n_layer, 2, 1, config.n_head, n_slots, config.n_embd // config.n_head
    cache = torch.full(shape, torch.nan, dtype=model.dtype, device=DEVICE)
    if ids.shape[1]:
        model(ids, **{CACHE: past})
        cache[..., start : start + ids.shape[1], :] = keys_and_values(past)
    return Prompt(cache, past)


def keys_and_values(past: DynamicCache) -> Tensor:
    """(L, 2, 1, H, T, D)."""
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in past.layers])  # type: ignore[attr-defined]


def doubled(past: DynamicCache, config: GPT2Config) -> DynamicCache:
    twin = DynamicCache(config=config)
    for i, layer in enumerate(past.layers):
        if layer.is_initialized:  # type: ignore[union-attr]
            twin.update(layer.keys.double(), layer.values.double(), i)  # type: ignore[union-attr]
    return twin
