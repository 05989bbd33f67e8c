"""The modules of a GPT-2, over the operations of `ops`.

Each class is a subclass of transformers' or torch's class with another forward: the parameters, their names and the
arguments are the same. `patching` swaps the classes. Shapes: B batch, T tokens, H heads, D head size, C channels.
"""

from functools import partial
from typing import Any

import torch
from fastgpt_kernels.common.precision import autocast_dtype
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D

import fastgpt.ops as ops

from .attention import append_to_cache, attend, is_nothing_hidden
from .checks import check_positions, check_token_ids
from .compat import CACHE, take_cache
from .patching import ATTENTION, replaces
from .plain import declare, fused_activation, is_as_imported, is_plain
from .recompute import computed_again, save_recipe

# --- embeddings and norms -------------------------------------------------------------------------------------------


@replaces(nn.Embedding, parts=("wte",))
class TokenEmbedding(nn.Embedding):
    """wte: refuses ids outside the vocabulary with a ValueError, on a GPU with torch's assertion."""

    def forward(self, input: Tensor) -> Tensor:
        check_token_ids(input, self.weight.shape[0])
        return super().forward(input)


@replaces(nn.Embedding, parts=("wpe",))
class PositionEmbedding(nn.Embedding):
    """wpe: refuses positions past the context with a ValueError, on a GPU with torch's assertion."""

    def forward(self, input: Tensor) -> Tensor:
        check_positions(input, self.weight.shape[0])
        return super().forward(input)


@replaces(nn.LayerNorm, parts=("ln_1", "ln_2", "ln_cross_attn", "ln_f"))
class LayerNorm(nn.LayerNorm):
    """Every LayerNorm of a GPT-2."""

    def forward(self, input: Tensor) -> Tensor:
        is_whole = self.weight is not None and self.bias is not None and self.normalized_shape == input.shape[-1:]
        if not (is_whole and is_as_imported(nn.LayerNorm)):
            return super().forward(input)
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


declare(LayerNorm(1), ("normalized_shape", "eps"), lambda it: (it.normalized_shape, it.normalized_shape))


def _is_plain_norm(norm: nn.Module) -> bool:
    return is_plain(norm, LayerNorm) and is_as_imported(nn.LayerNorm)


# --- attention ------------------------------------------------------------------------------------------------------


@replaces(hf.GPT2Attention)
class GPT2Attention(hf.GPT2Attention):
    """Causal self-attention; cross-attention and any other attn_implementation run transformers' own forward."""

    def forward(
        self,
        hidden_states: Tensor,
        past: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        past = take_cache(past, kwargs)
        is_ours = self.config._attn_implementation == ATTENTION and is_as_imported(hf.GPT2Attention)
        if not is_ours or encoder_hidden_states is not None or self.split_size != hidden_states.shape[-1]:
            arguments: Any = (hidden_states, past, attention_mask, encoder_hidden_states)
            return super().forward(*arguments, **kwargs)  # type: ignore[return-value]
        B, T, C = hidden_states.shape

        qkv = self.c_attn(hidden_states)
        qkv = qkv.view(B, T, 3, qkv.shape[-1] // (3 * self.head_dim), self.head_dim)
        query, key, value = ops.split_heads(qkv)  # views (B, H, T, D)
        if isinstance(past, EncoderDecoderCache):
            past = past.self_attention_cache
        if past is not None:
            assert self.layer_idx is not None
            key, value = append_to_cache(past, key, value, self.layer_idx, kwargs)  # (B, H, past + T, D)

        dropout_p = self.attn_dropout.p if self.training else 0.0
        # As in transformers: masks say what they hide, and where there is none, the caller or the configuration says
        # whether attention is causal, or else module.is_causal, but for a continued sequence, whose mask is causal.
        is_causal = kwargs.get("is_causal")
        is_causal = self.is_causal or key.shape[2] != T if is_causal is None else is_causal
        attended = attend(
            query, key, value, attention_mask, is_causal=is_causal, scale=self.scaling, dropout_p=dropout_p
        )
        attended = attended.transpose(1, 2).reshape(B, T, C).contiguous()  # with heads of one channel it is not dense
        return self.resid_dropout(self.c_proj(attended)), None


_ATTENTION = GPT2Attention(GPT2Config(n_embd=1, n_head=1))
declare(_ATTENTION, sizes=[*vars(_ATTENTION)])  # whatever its settings are


# --- MLP and block --------------------------------------------------------------------------------------------------


@replaces(hf.GPT2MLP)
class GPT2MLP(hf.GPT2MLP):
    """The MLP in one operation if both products are plain; it adds the residual if the block passes it."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        activation = fused_activation(self.act) if is_as_imported(hf.GPT2MLP) else None
        if activation is None or not (is_plain(fc, Conv1D) and is_plain(proj, Conv1D)):
            hidden_states = super().forward(hidden_states)  # type: ignore[arg-type]
        elif residual is None or not is_plain(self.dropout, nn.Dropout) or self.dropout.p == 1.0:
            hidden_states = ops.gelu_mlp(hidden_states, fc.weight, fc.bias, proj.weight, proj.bias, activation)
            hidden_states = self.dropout(hidden_states)
        else:
            dropout_p = self.dropout.p if self.dropout.training else 0.0
            weights = fc.weight, fc.bias, proj.weight, proj.bias
            return ops.gelu_mlp(hidden_states, *weights, activation, residual=residual, dropout_p=dropout_p)
        return hidden_states if residual is None else residual + hidden_states


declare(GPT2MLP(1, GPT2Config(n_embd=1)))


def _dtype_read_by(module: nn.Module, kind: type[nn.Module], product: str, x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts the norm of x, if nothing but one product of this module reads it.

    The norm then writes it at once: a pass over memory less, and another one in backward. None where the norm's own
    dtype is read.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return None
    is_only_reader = is_plain(module, kind) and is_plain(getattr(module, product), Conv1D)
    return dtype if is_only_reader else None


@replaces(hf.GPT2Block)
class GPT2Block(hf.GPT2Block):
    """One layer; one operation computes the residual sum and the second LayerNorm."""

    def __call__(self, *args, **kwargs) -> Tensor:
        # Before hooks and whatever else surrounds the forward, which see None there on transformers' model.
        if len(args) > 2 and is_nothing_hidden(args[2]):
            args = (*args[:2], None, *args[3:])
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        past: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs,
    ) -> Tensor:
        past = take_cache(past, kwargs)
        if not is_as_imported(hf.GPT2Block):
            encoder = encoder_hidden_states, encoder_attention_mask
            return super().forward(hidden_states, past, attention_mask, *encoder, use_cache, **kwargs)  # type: ignore[arg-type]
        recomputes = torch.is_grad_enabled() and self._recomputes_norms()
        recomputes_1, recomputes_2 = (recomputes and _is_plain_norm(norm) for norm in (self.ln_1, self.ln_2))
        norm_1 = partial(computed_again, self._norm_1) if recomputes_1 else self._norm_1
        normalised, residual = norm_1(hidden_states)  # (B, T, C)
        attended, _ = self.attn(
            normalised,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **{CACHE: past},
            **kwargs,
        )
        if recomputes_1:
            save_recipe(normalised, residual, self.ln_1, attended)

        if encoder_hidden_states is not None:
            residual = residual + attended
            attended = self._cross_attend(residual, past, encoder_hidden_states, encoder_attention_mask)

        if recomputes_2:
            normalised, residual = computed_again(self._add_and_norm_2, attended, residual)
        elif _is_plain_norm(self.ln_2):
            normalised, residual = self._add_and_norm_2(attended, residual)
        else:
            residual = residual + attended
            normalised = self.ln_2(residual)
        output = self.mlp(normalised, residual) if is_plain(self.mlp, GPT2MLP) else residual + self.mlp(normalised)
        if recomputes_2:
            save_recipe(normalised, residual, self.ln_2, output)
        return output

    def _recomputes_norms(self) -> bool:
        is_asked = getattr(getattr(self.attn, "config", None), "recompute_norms", False)
        return is_asked and not ops.is_transformed()

    def _norm_1(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        ln, dtype = self.ln_1, _dtype_read_by(self.attn, GPT2Attention, "c_attn", residual)
        if not _is_plain_norm(ln):
            return ln(residual), residual
        return ops.add_layer_norm(None, residual, ln.weight, ln.bias, ln.eps, dtype)

    def _add_and_norm_2(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        ln, dtype = self.ln_2, _dtype_read_by(self.mlp, GPT2MLP, "c_fc", residual)
        return ops.add_layer_norm(attended, residual, ln.weight, ln.bias, ln.eps, dtype)

    def _cross_attend(
        self,
        hidden_states: Tensor,
        past: Cache | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
    ) -> Tensor:
        if not hasattr(self, "crossattention"):
            raise ValueError("encoder_hidden_states needs a model built with config.add_cross_attention=True")
        attended, _ = self.crossattention(
            self.ln_cross_attn(hidden_states),
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **{CACHE: past},
        )
        return attended
