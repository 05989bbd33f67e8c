"""GPT-2 over the operations of `ops`: drop-in classes for transformers' own.

Every class here is transformers' class of the same name with another forward: same parameters, same names, same
arguments. `patching` swaps them. Shapes: B batch, T tokens, H heads, D head size, C channels, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import GenerationMixin, GPT2Config, LogitsProcessorList
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple

from . import ops, sampling
from .attention import attend, is_nothing_hidden, nothing_hidden
from .loading import LoadingMixin, check_config
from .outputs import training_logits
from .patching import ATTENTION, forward_of, replaces, swap_classes
from .plain import declare, fused_activation, is_as_imported, is_plain
from .prompts import pad_left
from .versions import CACHE, take_cache

# --- embeddings and norms -------------------------------------------------------------------------------------------


def _check_range(ids: Tensor, limit: int, message: str) -> None:
    # A captured or traced step cannot look at values.
    if ids.numel() == 0 or ids.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if isinstance(ids, FakeTensor) or ops.is_transformed():
        return
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lowest, highest = torch.stack(torch.aminmax(ids)).tolist()  # together: on a GPU each look waits for the device
    if lowest < 0 or highest >= limit:
        raise ValueError(message.format(value=lowest if lowest < 0 else highest, limit=limit))


@replaces(nn.Embedding, parts=("wte",))
class TokenEmbedding(nn.Embedding):
    """wte: refuses ids outside the vocabulary with a ValueError."""

    def forward(self, input: Tensor) -> Tensor:
        _check_range(
            input, self.weight.shape[0], "token id {value} is outside the vocabulary: it must be in [0, {limit})"
        )
        return super().forward(input)


@replaces(nn.Embedding, parts=("wpe",))
class PositionEmbedding(nn.Embedding):
    """wpe: refuses positions past the context with a ValueError."""

    def forward(self, input: Tensor) -> Tensor:
        _check_range(input, self.weight.shape[0], "position {value} is outside the context: n_positions is {limit}")
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
        # Each (B, H, T, D), read in place; taken apart along the packed axis, for backward stacks gradients along it.
        query, key, value = (heads.transpose(1, 2) for heads in qkv.unbind(2))
        if isinstance(past, EncoderDecoderCache):
            past = past.self_attention_cache
        if past is not None:
            assert self.layer_idx is not None
            key, value = past.update(key, value, self.layer_idx)  # (B, H, past + T, D)

        dropout_p = self.attn_dropout.p if self.training else 0.0
        # As in transformers, whose masks are causal whatever the module says: it decides where no mask is needed.
        is_causal = self.is_causal or attention_mask is not None or key.shape[2] != T
        attended = attend(
            query, key, value, attention_mask, is_causal=is_causal, scale=self.scaling, dropout_p=dropout_p
        )
        attended = attended.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(attended)), None


# --- MLP and block --------------------------------------------------------------------------------------------------


@replaces(hf.GPT2MLP)
class GPT2MLP(hf.GPT2MLP):
    """The MLP in one operation where both products are plain, the residual sum included where its block asks for it."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        activation = fused_activation(self.act) if is_as_imported(hf.GPT2MLP) else None
        if activation is None or not (is_plain(fc, Conv1D) and is_plain(proj, Conv1D)):
            hidden_states = super().forward(hidden_states)  # type: ignore[arg-type]
        elif residual is None or not is_plain(self.dropout, nn.Dropout):
            hidden_states = ops.gelu_mlp(hidden_states, fc.weight, fc.bias, proj.weight, proj.bias, activation)
            hidden_states = self.dropout(hidden_states)
        else:
            dropout_p = self.dropout.p if self.dropout.training else 0.0
            weights = fc.weight, fc.bias, proj.weight, proj.bias
            return ops.gelu_mlp(hidden_states, *weights, activation, residual=residual, dropout_p=dropout_p)
        return hidden_states if residual is None else residual + hidden_states


declare(GPT2MLP(1, GPT2Config(n_embd=1)))


@replaces(hf.GPT2Block)
class GPT2Block(hf.GPT2Block):
    """One layer; the residual sum and the second LayerNorm are one operation."""

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
        attention_mask = None if is_nothing_hidden(attention_mask) else attention_mask
        if not is_as_imported(hf.GPT2Block):
            encoder = encoder_hidden_states, encoder_attention_mask
            return super().forward(hidden_states, past, attention_mask, *encoder, use_cache, **kwargs)  # type: ignore[arg-type]
        residual = hidden_states  # (B, T, C)
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            attention_mask=attention_mask,
            use_cache=use_cache,
            **{CACHE: past},
            **kwargs,
        )

        if encoder_hidden_states is not None:
            residual = residual + attended
            attended = self._cross_attend(residual, past, encoder_hidden_states, encoder_attention_mask)

        if is_plain(self.ln_2, LayerNorm) and is_as_imported(nn.LayerNorm):
            ln = self.ln_2
            normalised, residual = ops.add_layer_norm(attended, residual, ln.weight, ln.bias, ln.eps)
        else:
            residual = residual + attended
            normalised = self.ln_2(residual)
        if is_plain(self.mlp, GPT2MLP):
            return self.mlp(normalised, residual)
        return residual + self.mlp(normalised)

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


# --- labels ---------------------------------------------------------------------------------------------------------


def _check_labels(labels: Any, limit: int, ignore_index: int = -100) -> None:
    """Raise ValueError on a label outside [0, limit) that is not ignored, as the fused training loss does."""
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        message = "label {value} is outside the classes: it must be in [0, {limit}) or " + str(ignore_index)
        _check_range(labels.where(labels != ignore_index, 0), limit, message)


# --- models ---------------------------------------------------------------------------------------------------------


class _DropIn(LoadingMixin):
    """What the six models share: build transformers' model, then change the class of its modules."""

    def __init__(self, config: GPT2Config, *args, **kwargs):
        check_config(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        swap_classes(self, to_fastgpt=True)  # type: ignore[arg-type]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        requested_attention = ATTENTION if requested_attention is None else requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]


# The parameters of transformers' loops over tokens. A function that someone has put in a loop's place may not say them.
LOOP = (
    *("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"),
    *("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer"),
)


def _shows_parameters_of(theirs: Callable) -> Callable[[Callable], Callable]:
    """Give a method that stands for transformers' the parameters of that one, followed by its own keyword-only ones."""

    def change(ours: Callable) -> Callable:
        signature = inspect.signature(theirs)
        own = [p for p in inspect.signature(ours).parameters.values() if p.kind is p.KEYWORD_ONLY]
        *parameters, options = signature.parameters.values()
        ours.__signature__ = signature.replace(parameters=[*parameters, *own, options])  # type: ignore[attr-defined]
        return ours

    return change


class _Generation:
    def _apply(self, fn, recurse=True):
        """What `to()`, `half()` and the like go through: they free what the engine keeps beside the weights."""
        from .engine import release

        release(self)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    @_shows_parameters_of(GenerationMixin.generate)  # type: ignore[attr-defined]
    def generate(
        self,
        inputs: "Tensor | Sequence[Tensor | Sequence[int]] | None" = None,
        generation_config=None,
        logits_processor=None,
        *args,
        seed: int | None = None,
        **kwargs,
    ):
        """transformers' `generate`, through the engine where it can take the call (see `routing`).

        inputs: (B, T) ids, or a list of prompts of different lengths, which are padded on the left.
        seed: decides every draw of sampling, whatever the batch a prompt is in; torch's generator does when None.
        Raises ValueError on wrong sampling options and on NaN logits.
        """
        sampling.check_generation_options(generation_config or self.generation_config, kwargs)  # type: ignore[attr-defined]
        prompt = kwargs.get("input_ids", inputs)
        if isinstance(prompt, list | tuple):
            if kwargs.get("attention_mask") is not None:
                raise ValueError("a list of prompts needs no attention_mask: each is taken whole")
            asked = kwargs.get("pad_token_id"), (generation_config or self.generation_config).pad_token_id  # type: ignore[attr-defined]
            pad_id = next((pad for pad in asked if pad is not None), 0)
            inputs, (prompt, mask) = None, pad_left(prompt, pad_id, self.device)  # type: ignore[attr-defined]
            kwargs |= {"input_ids": prompt, "attention_mask": mask}
        if isinstance(prompt, Tensor) and prompt.numel() == 0:
            raise ValueError(f"nothing to continue: the prompt has shape {tuple(prompt.shape)}")
        if seed is not None:
            logits_processor = LogitsProcessorList([*(logits_processor or []), sampling.Seed(seed)])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)  # type: ignore[misc]

    def stream(self, inputs: "Tensor | Sequence[Tensor | Sequence[int]] | None" = None, **options) -> Iterator[Tensor]:
        """The tokens that `generate` would append, (B,) each, as they come; stop asking and nothing more is computed.

        inputs, options: as `generate` takes them. Weights that change in place meanwhile count from the next call on.
        Raises ValueError, at once, on a call that the engine cannot take, and RuntimeError where the weights were moved
        or replaced before the next token.
        """
        from . import routing

        return self.generate(inputs, streamer=routing.Handover(), **options)

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args, **kwargs):
        attention = self.config._attn_implementation  # type: ignore[attr-defined]
        if attention != ATTENTION:
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        # Pages of keys are transformers' own, and so is the attention that reads them until the manager stops.
        self.set_attn_implementation("sdpa")  # type: ignore[attr-defined]
        try:
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.set_attn_implementation(attention)  # type: ignore[attr-defined]
            raise
        manager._original_attn_impl = attention
        return manager

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args, **kwargs) -> None:
        from . import routing

        routing.log_mode(generation_mode)
        super()._validate_generation_mode(generation_mode, *args, **kwargs)  # type: ignore[misc]

    # Here transformers' `generate` has prepared everything and starts its loop over tokens.

    @wraps(GenerationMixin._sample)  # type: ignore[attr-defined]
    def _sample(self, *args, **call):
        return self._through_engine(super()._sample, args, call)  # type: ignore[misc]

    @wraps(GenerationMixin._assisted_decoding)  # type: ignore[attr-defined]
    def _assisted_decoding(self, *args, **call):
        return self._through_engine(super()._assisted_decoding, args, call)  # type: ignore[misc]

    @wraps(GenerationMixin._beam_search)  # type: ignore[attr-defined]
    def _beam_search(self, *args, **call):
        call = dict(zip(LOOP, args, strict=False)) | call
        call["logits_processor"] = sampling.refusing_nan(call["logits_processor"])
        return super()._beam_search(call.pop("input_ids"), **call)  # type: ignore[misc]

    def _through_engine(self, loop: Callable, args: tuple, call: dict[str, Any]) -> Any:
        from . import routing

        call = dict(zip(LOOP, args, strict=False)) | call
        processors = sampling.settle_seed(
            call["logits_processor"], call["generation_config"], call.get("attention_mask")
        )
        call["logits_processor"] = sampling.refusing_nan(processors)
        input_ids = call.pop("input_ids")
        generated = routing.try_engine(self, input_ids, **call)
        return loop(input_ids, **call) if generated is None else generated


@replaces(hf.GPT2Model)
class GPT2Model(_DropIn, hf.GPT2Model):
    """transformers' GPT2Model with every block on fastgpt."""

    @forward_of(hf.GPT2Model)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        if input_ids is not None and input_ids.shape[-1] == 0:
            raise ValueError(f"no tokens: input_ids has shape {tuple(input_ids.shape)}")
        with self._masks_of_shared_layers():
            if self._hides_nothing(args, kwargs):
                # Elsewhere looking for padding would wait.
                if input_ids is not None and input_ids.device.type == "cpu":
                    self.warn_if_padding_and_no_attention_mask(input_ids, None)
                kwargs["attention_mask"] = nothing_hidden(self.wpe.weight)
            return hf.GPT2Model.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]

    @contextmanager
    def _masks_of_shared_layers(self) -> Iterator[None]:
        """Blocks that share one layer of the cache see more keys than the mask was made for: by transformers' rules."""
        places = [getattr(getattr(block, "attn", block), "layer_idx", block) for block in self.h]
        if self.config._attn_implementation != ATTENTION or len(set(places)) == len(places):
            yield
            return
        self.config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            self.config._attn_implementation = ATTENTION

    def _hides_nothing(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether each sequence is whole, alone in its row, and starts at position 0: as called, with our blocks."""
        given = ("attention_mask", "position_ids", "cache", "past_key_values")
        return (
            self.config._attn_implementation == ATTENTION
            and not args
            and all(kwargs.get(name) is None for name in given)
            and all(isinstance(block, GPT2Block) for block in self.h)
        )

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        super().set_input_embeddings(new_embeddings)
        if type(self.wte) is nn.Embedding:
            self.wte.__class__ = TokenEmbedding


@replaces(hf.GPT2LMHeadModel)
class GPT2LMHeadModel(_Generation, _DropIn, hf.GPT2LMHeadModel, GenerationMixin):
    """transformers' GPT2LMHeadModel with every block on fastgpt, and a training loss that needs no logits."""

    @can_return_tuple
    @forward_of(hf.GPT2LMHeadModel)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        if not self._fuses_loss(kwargs):
            shifted = kwargs.get("shift_labels")
            if shifted is None and isinstance(kwargs.get("labels"), Tensor):
                shifted = kwargs["labels"][..., 1:]
            if self.loss_function is ForCausalLMLoss:
                _check_labels(shifted, self.config.vocab_size, kwargs.get("ignore_index", -100))
            return hf.GPT2LMHeadModel.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]

        labels = kwargs.pop("labels")
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
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=training_logits(hidden_states, weight, loss),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    # transformers warns on every GPT-2 that it has to guess this loss, which also breaks torch.compile's full graph.
    @property
    def loss_function(self) -> Callable:
        chosen = "_loss_function" in self.__dict__ or self.loss_type is not None
        return super().loss_function if chosen else ForCausalLMLoss

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        self._loss_function = value

    def _fuses_loss(self, options: dict) -> bool:
        """Training with transformers' own loss on a plain head: then the logits need not exist."""
        return (
            options.get("labels") is not None
            and self.training
            and not torch.compiler.is_compiling()
            and not ops.is_transformed()
            and "logits_to_keep" not in options
            and "ignore_index" not in options
            and is_as_imported(hf.GPT2LMHeadModel)
            and is_plain(self.lm_head, nn.Linear)
            and self.lm_head.weight.dtype != torch.float64  # whose loss transformers computes in float32
            and self.loss_function is ForCausalLMLoss
        )


@replaces(hf.GPT2DoubleHeadsModel)
class GPT2DoubleHeadsModel(_Generation, _DropIn, hf.GPT2DoubleHeadsModel, GenerationMixin):
    """transformers' GPT2DoubleHeadsModel with every block on fastgpt."""

    @forward_of(hf.GPT2DoubleHeadsModel)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        if isinstance(kwargs.get("labels"), Tensor):
            _check_labels(kwargs["labels"][..., 1:], self.config.vocab_size)
        if input_ids is not None and input_ids.ndim > 1:
            _check_labels(kwargs.get("mc_labels"), input_ids.shape[-2])
        return hf.GPT2DoubleHeadsModel.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]


@replaces(hf.GPT2ForSequenceClassification)
class GPT2ForSequenceClassification(_DropIn, hf.GPT2ForSequenceClassification):
    """transformers' GPT2ForSequenceClassification with every block on fastgpt."""

    @forward_of(hf.GPT2ForSequenceClassification)
    def forward(self, *args, **kwargs):
        n_labels = self.num_labels or 0
        if n_labels > 1 and self.config.problem_type in (None, "single_label_classification"):
            _check_labels(kwargs.get("labels"), n_labels)
        return hf.GPT2ForSequenceClassification.forward(self, *args, **kwargs)


@replaces(hf.GPT2ForTokenClassification)
class GPT2ForTokenClassification(_DropIn, hf.GPT2ForTokenClassification):
    """transformers' GPT2ForTokenClassification with every block on fastgpt."""

    @forward_of(hf.GPT2ForTokenClassification)
    def forward(self, *args, **kwargs):
        _check_labels(kwargs.get("labels"), self.num_labels or 0)
        return hf.GPT2ForTokenClassification.forward(self, *args, **kwargs)


@replaces(hf.GPT2ForQuestionAnswering)
class GPT2ForQuestionAnswering(_DropIn, hf.GPT2ForQuestionAnswering):
    """transformers' GPT2ForQuestionAnswering with every block on fastgpt."""
