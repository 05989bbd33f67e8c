"""GPT-2 over the operations of `ops`: drop-in classes for transformers' own, and patch() for a model that exists.

Every class here is transformers' class of the same name with another forward: same parameters, same names, same
arguments. Nothing is stored in a module that transformers would not store, so a model changes sides by changing the
class of its modules. Shapes: B batch, T tokens, H heads, D head size, C channels, V vocabulary.
"""

from collections.abc import Callable
from functools import wraps
from types import MethodType, NoneType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, LogitsProcessorList
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from . import ops, sampling
from .loading import LoadingMixin, check_config

# The name under which our attention is registered with transformers: config._attn_implementation.
ATTENTION = "fastgpt"


# --- what may be fused ----------------------------------------------------------------------------------------------


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly `kind` and calling it does nothing else, so that its weights may be used directly.

    LoRA and quantisation replace the class, hooks and device dispatch surround the call, FSDP2 and tensor
    parallelism replace the parameters: all of these must go through the module's own forward.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not nn.modules.module._has_any_global_hook()
        and all(type(parameter) in (nn.Parameter, Tensor, NoneType) for parameter in module._parameters.values())
    )


def _fused_activation(act: nn.Module) -> str | None:
    """The name under which `gelu_mlp` knows this activation module."""
    is_python_twin = isinstance(getattr(act, "act", None), MethodType)  # gelu_python: unfused, as its user asked
    return None if is_python_twin or not is_plain(act, type(act)) else _ACTIVATIONS.get(type(act))


_ACTIVATIONS: dict[type[nn.Module], str] = {
    NewGELUActivation: "gelu_new",
    GELUTanh: "gelu_new",
    GELUActivation: "gelu",
    FastGELUActivation: "gelu_fast",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}


# --- embeddings and norms -------------------------------------------------------------------------------------------


def _check_range(ids: Tensor, limit: int, message: str) -> None:
    # A captured or traced step cannot look at values.
    if ids.numel() == 0 or ids.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lowest, highest = (bound.item() for bound in torch.aminmax(ids))
    if lowest < 0 or highest >= limit:
        raise ValueError(message.format(value=lowest if lowest < 0 else highest, limit=limit))


class TokenEmbedding(nn.Embedding):
    """wte: refuses ids outside the vocabulary with a ValueError."""

    def forward(self, input: Tensor) -> Tensor:
        _check_range(
            input, self.num_embeddings, "token id {value} is outside the vocabulary: it must be in [0, {limit})"
        )
        return super().forward(input)


class PositionEmbedding(nn.Embedding):
    """wpe: refuses positions past the context with a ValueError."""

    def forward(self, input: Tensor) -> Tensor:
        _check_range(input, self.num_embeddings, "position {value} is outside the context: n_positions is {limit}")
        return super().forward(input)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


# --- attention ------------------------------------------------------------------------------------------------------


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float, dropout_p: float
) -> Tensor:
    """Attention over any mask that `attention_mask` makes or a user passes.

    query (B, H, Tq, D), key and value (B, H, Tk, D). mask: None, (B, Tk) bool over the keys, or four axes, bool or
    additive, which says everything itself. Returns (B, H, Tq, D).
    """
    if is_causal and (mask is None or mask.ndim == 2):
        return ops.causal_attention(query, key, value, scale=scale, key_padding_mask=mask, dropout_p=dropout_p)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`attend` in the form that transformers calls: attn_implementation="fastgpt" on any model with full attention.

    Returns (B, Tq, H, D) and no attention weights.
    """
    n_groups = getattr(module, "num_key_value_groups", 1)
    if n_groups > 1:
        key, value = key.repeat_interleave(n_groups, dim=1), value.repeat_interleave(n_groups, dim=1)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = attend(query, key, value, attention_mask, is_causal=is_causal, scale=scale, dropout_p=dropout)
    return attended.transpose(1, 2).contiguous(), None


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """The least that says what may be seen: None, (B, Tk) bool over the keys, or (B, 1, Tq, Tk) bool.

    Called by transformers with the pattern (`mask_function`) and the padding (`attention_mask`, 2-D bool).
    """
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    is_plain_causal = mask_function is causal_mask_function and at_the_end
    if not (is_plain_causal or mask_function is bidirectional_mask_function):
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    padding = F.pad(padding, (0, kv_length - padding.shape[1]), value=False)
    nothing_hidden = not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and bool(padding.all())
    return None if nothing_hidden else padding


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, attention_mask)


class GPT2Attention(hf.GPT2Attention):
    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if self.config._attn_implementation != ATTENTION or encoder_hidden_states is not None:
            return super().forward(hidden_states, past_key_values, attention_mask, encoder_hidden_states, **kwargs)
        B, T, C = hidden_states.shape

        qkv = self.c_attn(hidden_states).view(B, T, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), read in place
        if isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = past_key_values.self_attention_cache
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, past + T, D)

        dropout_p = self.attn_dropout.p if self.training else 0.0
        attended = attend(
            query, key, value, attention_mask, is_causal=self.is_causal, scale=self.scaling, dropout_p=dropout_p
        )
        attended = attended.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(attended)), None


# --- MLP and block --------------------------------------------------------------------------------------------------


class GPT2MLP(hf.GPT2MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        fc, proj, activation = self.c_fc, self.c_proj, _fused_activation(self.act)
        if activation is None or not (is_plain(fc, Conv1D) and is_plain(proj, Conv1D)):
            return super().forward(hidden_states)
        hidden_states = ops.gelu_mlp(hidden_states, fc.weight, fc.bias, proj.weight, proj.bias, activation)
        return self.dropout(hidden_states)


class GPT2Block(hf.GPT2Block):
    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs,
    ) -> Tensor:
        residual = hidden_states  # (B, T, C)
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )

        if encoder_hidden_states is not None:
            residual = residual + attended
            attended = self._cross_attend(residual, past_key_values, encoder_hidden_states, encoder_attention_mask)

        if is_plain(self.ln_2, LayerNorm):
            ln = self.ln_2
            normalised, residual = ops.add_layer_norm(attended, residual, ln.weight, ln.bias, ln.eps)
        else:
            residual = residual + attended
            normalised = self.ln_2(residual)
        return residual + self.mlp(normalised)

    def _cross_attend(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
    ) -> Tensor:
        if not hasattr(self, "crossattention"):
            raise ValueError("encoder_hidden_states needs a model built with config.add_cross_attention=True")
        attended, _ = self.crossattention(
            self.ln_cross_attn(hidden_states),
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        return attended


# --- models ---------------------------------------------------------------------------------------------------------


class _DropIn(LoadingMixin):
    """What the six models share: build transformers' model, then change the class of its modules."""

    def __init__(self, config, *args, **kwargs):
        check_config(config)
        super().__init__(config, *args, **kwargs)
        _swap_classes(self, TO_FASTGPT)  # type: ignore[arg-type]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        requested_attention = ATTENTION if requested_attention is None else requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]


class _Generation:
    def generate(self, inputs: Tensor | None = None, generation_config=None, logits_processor=None, *args, **kwargs):
        """transformers' `generate`, with wrong sampling options and NaN logits refused by a ValueError."""
        sampling.check_generation_options(generation_config or self.generation_config, kwargs)  # type: ignore[attr-defined]
        logits_processor = LogitsProcessorList([*(logits_processor or []), sampling.RefuseNaN()])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)  # type: ignore[misc]


class GPT2Model(_DropIn, hf.GPT2Model):
    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        super().set_input_embeddings(new_embeddings)
        if type(self.wte) is nn.Embedding:
            self.wte.__class__ = TokenEmbedding


class CausalLMOutput(CausalLMOutputWithCrossAttentions):
    """The output of a training step whose loss was computed without logits: reading them computes them.

    `output.logits`, `output["logits"]`, indexing and `to_tuple()` give what transformers gives. Iterating over the
    keys shows the logits only once they were read.
    """

    def with_lazy_logits(self, compute_logits: Callable[[], Tensor]) -> "CausalLMOutput":
        self.__dict__["_compute_logits"] = compute_logits
        return self

    def __getattribute__(self, name: str):
        value = super().__getattribute__(name)
        if name == "logits" and value is None and (compute_logits := self.__dict__.pop("_compute_logits", None)):
            self.logits = value = compute_logits()
            for later in [key for key in self.keys() if key not in ("loss", "logits")]:
                self.move_to_end(later)
        return value

    def __getitem__(self, key):
        _ = self.logits if key == "logits" else None
        return super().__getitem__(key)

    def to_tuple(self) -> tuple:
        _ = self.logits
        return super().to_tuple()


class GPT2LMHeadModel(_Generation, _DropIn, hf.GPT2LMHeadModel, GenerationMixin):
    @can_return_tuple
    @wraps(hf.GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        labels = kwargs.pop("labels", None)
        if not self._fuses_loss(labels, kwargs):
            return hf.GPT2LMHeadModel.forward(self, input_ids, *args, labels=labels, **kwargs)

        outputs = self.transformer(input_ids, *args, **kwargs)
        hidden_states, weight = outputs.last_hidden_state, self.lm_head.weight  # (B, T, C), (V, C)
        shift_labels = kwargs.get("shift_labels")
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]  # tokens < t predict t
        n_items = kwargs.get("num_items_in_batch")
        loss = ops.linear_cross_entropy(
            hidden_states.flatten(0, -2),
            weight,
            shift_labels.flatten().to(hidden_states.device),
            reduction="mean" if n_items is None else "sum",
        )
        if n_items is not None:
            loss = loss / (n_items.to(loss.device) if isinstance(n_items, Tensor) else n_items)
        return CausalLMOutput(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        ).with_lazy_logits(lambda: self.lm_head(hidden_states))

    def _fuses_loss(self, labels: Tensor | None, options: dict) -> bool:
        """Training with transformers' own loss on a plain head: then the logits need not exist."""
        return (
            labels is not None
            and self.training
            and not torch.compiler.is_compiling()
            and "logits_to_keep" not in options
            and "ignore_index" not in options
            and is_plain(self.lm_head, nn.Linear)
            and self.lm_head.bias is None
            and self.loss_function is ForCausalLMLoss
        )


class GPT2DoubleHeadsModel(_Generation, _DropIn, hf.GPT2DoubleHeadsModel, GenerationMixin):
    pass


class GPT2ForSequenceClassification(_DropIn, hf.GPT2ForSequenceClassification):
    pass


class GPT2ForTokenClassification(_DropIn, hf.GPT2ForTokenClassification):
    pass


class GPT2ForQuestionAnswering(_DropIn, hf.GPT2ForQuestionAnswering):
    pass


# --- patch ----------------------------------------------------------------------------------------------------------

TO_FASTGPT: dict[type[nn.Module], type[nn.Module]] = {
    hf.GPT2Attention: GPT2Attention,
    hf.GPT2MLP: GPT2MLP,
    hf.GPT2Block: GPT2Block,
    hf.GPT2Model: GPT2Model,
    hf.GPT2LMHeadModel: GPT2LMHeadModel,
    hf.GPT2DoubleHeadsModel: GPT2DoubleHeadsModel,
    hf.GPT2ForSequenceClassification: GPT2ForSequenceClassification,
    hf.GPT2ForTokenClassification: GPT2ForTokenClassification,
    hf.GPT2ForQuestionAnswering: GPT2ForQuestionAnswering,
}
TO_TRANSFORMERS = {ours: theirs for theirs, ours in TO_FASTGPT.items()}

# Classes that other models use too: they change only as parts of a GPT-2 module, by attribute name.
_PARTS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "wte": (nn.Embedding, TokenEmbedding),
    "wpe": (nn.Embedding, PositionEmbedding),
    "ln_1": (nn.LayerNorm, LayerNorm),
    "ln_2": (nn.LayerNorm, LayerNorm),
    "ln_cross_attn": (nn.LayerNorm, LayerNorm),
    "ln_f": (nn.LayerNorm, LayerNorm),
}

# transformers records hidden states and attentions by the name of the model's class.
for _theirs, _ours in TO_FASTGPT.items():
    if issubclass(_ours, hf.GPT2PreTrainedModel):
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(_ours), _ours._can_record_outputs)


M = TypeVar("M", bound=nn.Module)


def _swap_classes(model: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> int:
    """Change the class of every module in `table` and of its parts: all or none. Returns how many GPT-2 modules."""
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in model.modules():
        if type(module) not in TO_FASTGPT and type(module) not in TO_TRANSFORMERS:
            continue
        if type(module) in table:
            swaps.append((module, table[type(module)]))
        for name, pair in _PARTS.items():
            part = module._modules.get(name)
            before, after = pair if table is TO_FASTGPT else pair[::-1]
            if part is not None and type(part) is before:
                swaps.append((part, after))
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, new_class in swaps:
            done.append((module, type(module)))
            module.__class__ = new_class
    except BaseException:
        for module, old_class in done:
            module.__class__ = old_class
        raise
    return sum(new_class in table.values() for _, new_class in swaps)


def patch(model: M) -> M:
    """Make a transformers GPT-2, or a model that contains one, run on fastgpt; in place.

    Weights, hooks, adapters and settings stay as they are. transformers' default attention ("sdpa") gives way to
    ours; one that was chosen ("eager", "flex_attention", ...) is kept. Undone by `unpatch`.
    Returns the model. Raises ValueError, the model untouched, when there is no GPT-2 in it.
    """
    if any(type(module) in TO_TRANSFORMERS for module in model.modules()):
        raise ValueError("this model already runs on fastgpt")
    if not _swap_classes(model, TO_FASTGPT):
        raise ValueError(f"no transformers GPT-2 module in {type(model).__name__}: nothing to patch")
    _rename_attention(model, "sdpa", ATTENTION)
    return model


def unpatch(model: M) -> M:
    """Give a model that runs on fastgpt its transformers classes back; in place.

    Returns the model. Raises ValueError, the model untouched, when nothing in it runs on fastgpt.
    """
    if not _swap_classes(model, TO_TRANSFORMERS):
        raise ValueError(f"nothing in {type(model).__name__} runs on fastgpt: nothing to unpatch")
    _rename_attention(model, ATTENTION, "sdpa")
    return model


def _rename_attention(model: nn.Module, before: str, after: str) -> None:
    for module in model.modules():
        if isinstance(module, hf.GPT2PreTrainedModel | hf.GPT2Attention):
            config = module.config
            if config._attn_implementation == before:
                config._attn_implementation = after
