"""The six GPT-2 models: drop-in classes for transformers' own, over the operations of `ops`.

Each class is a subclass of transformers' class of the same name with another forward: the parameters, their names and
the arguments are the same. Shapes: B batch, T tokens, C channels, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2Config, PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.utils.generic import can_return_tuple

import fastgpt.ops as ops

from .checkpoint.fit import check_config
from .checkpoint.loading import LoadingMixin
from .generate.api import GenerationMethods
from .model.attention import nothing_hidden
from .model.blocks import GPT2MLP, GPT2Attention, GPT2Block, LayerNorm, PositionEmbedding, TokenEmbedding
from .model.checks import check_labels, check_length
from .model.compat import CACHE
from .model.compiled_logits import compiled_logits
from .model.loss import CausalLMLoss, fusable, shifted
from .model.outputs import head_dtype, with_logits
from .model.patching import ATTENTION, forward_of, named, replaces, swap_classes
from .model.plain import is_as_imported, is_plain
from .model.rounded import RoundedLinear

__all__ = [
    "GPT2MLP",
    "GPT2Attention",
    "GPT2Block",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "LayerNorm",
    "PositionEmbedding",
    "TokenEmbedding",
]


class _DropIn(LoadingMixin):
    """Shared by the six models: build transformers' model, then swap the classes of its modules."""

    def __init__(self, config: GPT2Config, *args, **kwargs):
        if isinstance(config, PreTrainedConfig):  # of anything else transformers says what it is not
            check_config(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        swap_classes(self, to_fastgpt=True)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not of our own classes: in custom code transformers does not scale new projections to the residual stream."""
        return cls.__module__ != __name__ and super().is_custom_code()  # type: ignore[misc]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        requested_attention = ATTENTION if requested_attention is None else requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As transformers' own. Raises ValueError, and changes nothing, when the head is rounded."""
        head = getattr(self, "lm_head", None)
        if isinstance(head, RoundedLinear):
            raise ValueError(
                f"the head has {head.matrix_type.kind} weights: resize before fastgpt.quantize(model, head=True)"
            )
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]


# The configuration of a model whose blocks share layers is switched during a forward, which other threads wait for.
_one_thread = RLock()


@replaces(hf.GPT2Model)
class GPT2Model(_DropIn, hf.GPT2Model):
    """transformers' GPT2Model with every block on fastgpt."""

    @forward_of(hf.GPT2Model)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        if input_ids is not None and input_ids.shape[-1] == 0:
            raise ValueError(f"no tokens: input_ids has shape {tuple(input_ids.shape)}")
        looks_up_positions = isinstance(self.wpe, PositionEmbedding) and kwargs.get("position_ids") is None
        if input_ids is not None and not args and looks_up_positions:
            check_length(input_ids.shape[-1], self.wpe.weight.shape[0])
        x = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        with self._masks_of_shared_layers():
            if x is not None and self._hides_nothing(args, kwargs):
                # On a GPU, looking for padding would wait for the device.
                if input_ids is not None and not input_ids.is_cuda:
                    self.warn_if_padding_and_no_attention_mask(input_ids, None)
                kwargs["attention_mask"] = nothing_hidden(x)
            return hf.GPT2Model.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]

    @contextmanager
    def _masks_of_shared_layers(self) -> Iterator[None]:
        """Use transformers' masks when blocks share a layer of the cache: they see more keys than our mask has."""
        layers = [getattr(getattr(block, "attn", block), "layer_idx", block) for block in self.h]
        if len(set(layers)) == len(layers):
            yield
            return
        with nullcontext() if torch.compiler.is_compiling() else _one_thread:
            attention = self.config._attn_implementation
            if attention == ATTENTION:
                self.config._attn_implementation = "sdpa"
            try:
                yield
            finally:
                self.config._attn_implementation = attention

    def _hides_nothing(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the call shows that every row is one whole sequence from position 0, run by our blocks."""
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
class GPT2LMHeadModel(GenerationMethods, _DropIn, hf.GPT2LMHeadModel, GenerationMixin):
    """transformers' GPT2LMHeadModel with every block on fastgpt, and a training loss that needs no logits."""

    @can_return_tuple
    @forward_of(hf.GPT2LMHeadModel)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        loss_function = self._fused_loss(kwargs)
        if loss_function is None:
            given = named(hf.GPT2LMHeadModel, args, kwargs)
            targets = given.get("shift_labels")
            if targets is None and isinstance(given.get("labels"), Tensor):
                targets = shifted(given["labels"], given.get("ignore_index", -100))
            if targets is not None and fusable(self.loss_function):
                check_labels(targets, self.config.vocab_size, given.get("ignore_index", -100))
            return hf.GPT2LMHeadModel.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]

        labels, shift_labels = kwargs.pop("labels"), kwargs.pop("shift_labels", None)
        if shift_labels is None:
            shift_labels = shifted(labels)
        outputs = self.transformer(input_ids, *args, **kwargs)
        hidden_states, weight = outputs.last_hidden_state, self.lm_head.weight  # (B, T, C), (V, C)
        loss = loss_function.fused(hidden_states, weight, shift_labels, **kwargs)
        if torch.compiler.is_compiling():
            logits = compiled_logits(hidden_states, weight, head_dtype(hidden_states))
        else:
            options = {"vocab_size": len(weight), "num_items_in_batch": kwargs.get("num_items_in_batch")}
            loss_of_logits = partial(loss_function, labels=None, shift_labels=shift_labels, **options)
            loss, logits = with_logits(loss, hidden_states, weight, loss_of_logits)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    # transformers warns that it guesses the loss of a GPT-2, and the warning breaks torch.compile's full graph.
    @property
    def loss_function(self) -> Callable:
        if "_loss_function" in self.__dict__:
            return self._loss_function
        return ForCausalLMLoss if self.loss_type is None else super().loss_function

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        self._loss_function = value

    def _fused_loss(self, options: dict) -> CausalLMLoss | None:
        """The loss to compute without logits, where this trains with such a loss on a plain head."""
        is_fused = (
            options.get("labels") is not None
            and self.training
            and not ops.is_transformed()
            and not ops.is_exporting()  # an exported program returns plain tensors, which it must compute
            # Tensors of inference mode do not tell whether they have changed; Dynamo refuses to trace the questions.
            and (torch.compiler.is_compiling() or not (torch.is_inference_mode_enabled() or torch.jit.is_tracing()))
            and "logits_to_keep" not in options
            and "ignore_index" not in options
            and is_as_imported(hf.GPT2LMHeadModel)
            and is_plain(self.lm_head, nn.Linear)
            and len(self.lm_head.weight) == self.config.vocab_size  # of any other transformers computes no loss
            and self.lm_head.weight.dtype != torch.float64  # whose loss transformers computes in float32
        )
        return fusable(self.loss_function) if is_fused else None


@replaces(hf.GPT2DoubleHeadsModel)
class GPT2DoubleHeadsModel(GenerationMethods, _DropIn, hf.GPT2DoubleHeadsModel, GenerationMixin):
    """transformers' GPT2DoubleHeadsModel with every block on fastgpt."""

    @forward_of(hf.GPT2DoubleHeadsModel)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        given = named(hf.GPT2DoubleHeadsModel, args, kwargs)
        if isinstance(given.get("labels"), Tensor):
            check_labels(given["labels"][..., 1:], self.config.vocab_size)
        embeddings = given.get("inputs_embeds")  # (..., choices, T, C)
        tokens = embeddings[..., 0] if input_ids is None and embeddings is not None else input_ids
        if tokens is not None and tokens.ndim > 1:
            check_labels(given.get("mc_labels"), tokens.shape[-2])
        return hf.GPT2DoubleHeadsModel.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]


@replaces(hf.GPT2ForSequenceClassification)
class GPT2ForSequenceClassification(_DropIn, hf.GPT2ForSequenceClassification):
    """transformers' GPT2ForSequenceClassification with every block on fastgpt."""

    @forward_of(hf.GPT2ForSequenceClassification)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        n_labels = self.num_labels or 0
        if n_labels > 1 and self.config.problem_type in (None, "single_label_classification"):
            check_labels(named(hf.GPT2ForSequenceClassification, args, kwargs).get("labels"), n_labels)
        return hf.GPT2ForSequenceClassification.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]


@replaces(hf.GPT2ForTokenClassification)
class GPT2ForTokenClassification(_DropIn, hf.GPT2ForTokenClassification):
    """transformers' GPT2ForTokenClassification with every block on fastgpt."""

    @forward_of(hf.GPT2ForTokenClassification)
    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        labels = named(hf.GPT2ForTokenClassification, args, kwargs).get("labels")
        check_labels(labels, self.num_labels or 0)
        return hf.GPT2ForTokenClassification.forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]


@replaces(hf.GPT2ForQuestionAnswering)
class GPT2ForQuestionAnswering(_DropIn, hf.GPT2ForQuestionAnswering):
    """transformers' GPT2ForQuestionAnswering with every block on fastgpt."""
