"""The rows of the first table: what a forward of the six classes may be given and asked for.

B rows, T tokens, C channels. For GPT2DoubleHeadsModel the ids have a further axis of choices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from models import token_ids
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import QuantizedCache

from fastgpt.model.compat import CACHE

Call = Callable[[Any, Tensor], Any]
N_TOKENS = 9
# Of a continued call, in the first part.
N_BEFORE = 6


@dataclass(frozen=True)
class Row:
    """name: as on the page. call: what is done with a model and ids. takes: names of arguments of forward that it uses.

    config: changes of the configuration. attention: as transformers' attn_implementation. needs: a package without
    which transformers cannot do it, or "cuda". kernels: the call on kernels, if it is another one.
    """

    name: str
    call: Call
    takes: frozenset[str] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    needs: str | None = None
    is_trained: bool = False
    kernels: Call | None = None


def ids_for(head: str) -> Tensor:
    """(2, T) ids, (2, 2, T) for the class that chooses among texts."""
    n_rows = 4 if head == "GPT2DoubleHeadsModel" else 2
    ids = token_ids(n_rows, N_TOKENS, 131)
    return ids.view(2, 2, N_TOKENS) if head == "GPT2DoubleHeadsModel" else ids


def rows_of(ids: Tensor) -> Tensor:
    """(B, T): without the axis of choices."""
    return ids.flatten(0, -2)


# --- masks and positions --------------------------------------------------------------------------------------------


def padding(side: str) -> Callable[[Tensor], Tensor]:
    hidden = {"left": slice(0, 3), "right": slice(-3, None), "holes": slice(3, 5)}[side]

    def mask(ids: Tensor) -> Tensor:
        shown = torch.ones_like(ids)
        shown[0, ..., hidden] = 0
        return shown

    return mask


def shown_matrix(ids: Tensor) -> Tensor:
    """(B, 1, T, T) bool: causal, and one token that later ones do not see."""
    shown = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool).tril()
    shown[5:, 2] = False
    return shown.expand(len(rows_of(ids)), 1, -1, -1)


def added_matrix(ids: Tensor) -> Tensor:
    shown = shown_matrix(ids)
    return torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)


def packed(ids: Tensor) -> Tensor:
    """Positions of two sequences in a row."""
    return torch.tensor([*range(4), *range(N_TOKENS - 4)]).expand(rows_of(ids).shape)


# --- calls ----------------------------------------------------------------------------------------------------------


def given(**inputs: Any) -> Call:
    """One forward; a function makes an input from the ids."""
    return lambda model, ids: model(ids, **made(inputs, ids))


def made(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    return {name: value(ids) if callable(value) else value for name, value in inputs.items()}


def embedded(model: Any, ids: Tensor) -> Any:
    body = getattr(model, "transformer", model)
    return model(inputs_embeds=0.7 * body.wte(rows_of(ids)))


def continued(make_cache: Callable[[Any], Any], **inputs: Any) -> Call:
    """Two forwards over one cache."""

    def call(model: Any, ids: Tensor) -> Any:
        ids = rows_of(ids)
        options = {CACHE: make_cache(model.config)} | made(inputs, ids)
        return model(ids[:, :N_BEFORE], **options), model(ids[:, N_BEFORE:], **options)

    return call


def with_encoder(config: Any) -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def quantized(config: Any) -> QuantizedCache:
    return QuantizedCache("quanto", config, nbits=4, axis_key=0, axis_value=0, residual_length=4)


LABELS: dict[str, Call] = {
    "GPT2LMHeadModel": given(labels=lambda ids: ids),
    "GPT2DoubleHeadsModel": given(labels=lambda ids: ids, mc_labels=torch.tensor([0, 1])),
    "GPT2ForSequenceClassification": given(labels=torch.tensor([0, 1])),
    "GPT2ForTokenClassification": given(labels=lambda ids: ids % 2),
    "GPT2ForQuestionAnswering": given(start_positions=torch.tensor([0, 3]), end_positions=torch.tensor([4, 99])),
}


def labelled(model: Any, ids: Tensor) -> Any:
    """The loss of the class; GPT2Model has none."""
    return LABELS.get(type(model).__name__, given(labels=lambda ids: ids))(model, ids)


def resized(model: Any, ids: Tensor) -> Any:
    torch.manual_seed(0)
    model.resize_token_embeddings(140, mean_resizing=False)
    return model((ids + 20) % 140)


def encoded(ids: Tensor) -> Tensor:
    """(B, 5, C): states of an encoder."""
    n_rows = len(rows_of(ids))
    return torch.linspace(-1, 1, n_rows * 5 * 64).view(n_rows, 5, 64)


def encoder_mask(ids: Tensor) -> Tensor:
    return torch.tensor([[1, 1, 1, 0, 0]]).expand(len(rows_of(ids)), -1)


def takes(*names: str) -> frozenset[str]:
    return frozenset(names)


CROSS = {"add_cross_attention": True}
MASK, LABEL_NAMES = takes("attention_mask"), ("labels", "mc_labels", "start_positions", "end_positions")
FORWARD = [
    Row("`input_ids`", given(), takes("input_ids")),
    Row("the same in training", given(), is_trained=True),
    Row("`attention_mask`, padding on the left", given(attention_mask=padding("left")), MASK),
    Row("`attention_mask`, padding on the right", given(attention_mask=padding("right")), MASK),
    Row("`attention_mask` with holes", given(attention_mask=padding("holes")), MASK),
    Row("`attention_mask` (B, 1, T, T), bool", given(attention_mask=shown_matrix), MASK),
    Row("`attention_mask` (B, 1, T, T), added", given(attention_mask=added_matrix), MASK),
    Row("`is_causal=False`", given(is_causal=False)),
    Row("`position_ids`", given(position_ids=lambda ids: rows_of(ids) % 40), takes("position_ids")),
    Row("packed sequences, by `position_ids`", given(position_ids=packed, use_cache=False), takes("position_ids")),
    Row("`token_type_ids`", given(token_type_ids=lambda ids: ids.flip(-1)), takes("token_type_ids")),
    Row("`inputs_embeds`", embedded, takes("inputs_embeds")),
    Row("`use_cache=False`", given(use_cache=False), takes("use_cache")),
    Row("DynamicCache", continued(lambda config: DynamicCache(config=config)), takes(CACHE)),
    Row("StaticCache", continued(lambda config: StaticCache(config=config, max_cache_len=20)), takes(CACHE)),
    Row("QuantizedCache", continued(quantized), takes(CACHE), needs="optimum.quanto"),
    Row("offloaded cache", continued(lambda config: DynamicCache(config=config, offloading=True)), needs="cuda"),
    Row("EncoderDecoderCache", continued(with_encoder, encoder_hidden_states=encoded), takes(CACHE), CROSS),
    Row(
        "`encoder_hidden_states`, `encoder_attention_mask`",
        given(encoder_hidden_states=encoded, encoder_attention_mask=encoder_mask),
        takes("encoder_hidden_states", "encoder_attention_mask"),
        CROSS,
    ),
    Row("`output_hidden_states`", given(output_hidden_states=True)),
    Row("`output_attentions` in eager attention", given(output_attentions=True), attention="eager"),
    Row("`output_attentions` otherwise", given(output_attentions=True)),
    Row("`return_dict=False`", given(return_dict=False)),
    Row("`logits_to_keep` as a number", given(logits_to_keep=3), takes("logits_to_keep")),
    Row("`logits_to_keep` as indices", given(logits_to_keep=torch.tensor([0, 4])), takes("logits_to_keep")),
    Row("`mc_token_ids`", given(mc_token_ids=torch.tensor([[3, 5], [8, 0]])), takes("mc_token_ids")),
    Row("labels", labelled, takes(*LABEL_NAMES)),
    Row("labels in training", labelled, takes(*LABEL_NAMES), is_trained=True),
    Row("a head of its own (`tie_word_embeddings=False`)", given(), config={"tie_word_embeddings": False}),
    Row("`resize_token_embeddings`", resized),
    Row("`resize_token_embeddings` of an untied head", resized, config={"tie_word_embeddings": False}),
    Row("`scale_attn_by_inverse_layer_idx`", given(), config={"scale_attn_by_inverse_layer_idx": True}),
    Row("`reorder_and_upcast_attn`", given(), config={"reorder_and_upcast_attn": True}),
    Row('`activation_function="mish"`', given(), config={"activation_function": "mish"}),
]
