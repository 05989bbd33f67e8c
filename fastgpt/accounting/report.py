"""The report of `fastgpt params`."""

import dataclasses
from typing import Any

from .costs import (
    H200_BANDWIDTH,
    H200_MATRIX_RATE,
    adamw_bytes,
    decode_bytes,
    decode_ceiling,
    forward_flops,
    kv_cache_bytes,
    prefill_ceiling,
    roundings,
    training_ceiling,
    training_flops,
    training_state_bytes,
    weight_bytes,
)
from .saved import PRECISIONS, activation_bytes, layer_saved_bytes, saved_bytes
from .shapes import Shape, Source, count_parameters, describe


def report(
    source: Source,
    *,
    bandwidth: float = H200_BANDWIDTH,
    matrix_rate: float = H200_MATRIX_RATE,
    batch: int = 1,
    context: int | None = None,
) -> dict[str, Any]:
    """All counts, costs and limits of one model, ready for JSON; "total" is the exact number of parameters.

    source: as for `count_parameters`. bandwidth: bytes/s. matrix_rate: FLOP/s. batch, context: sequences and their
    tokens, for caches, activations and speed limits (in bf16); None takes the whole context.
    A module, and any model but a GPT-2, gets only parameters, weights and training state.
    Raises ValueError on an unknown model or a value that is out of range.
    """
    for field, value in {"bandwidth": bandwidth, "matrix_rate": matrix_rate, "batch": batch}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{field} must be a finite number above 0, not {value}")
    name, model = describe(source)
    count = count_parameters(model)
    total = count.total
    result = {
        "model": name,
        "total": total,
        "components": [
            {**dataclasses.asdict(part), "subtotal": part.subtotal, "share": part.subtotal / max(total, 1)}
            for part in count.components
        ],
        "weight_bytes": {"fp32": 4 * total, "bf16": 2 * total},
        "training_state_bytes": {precision: training_state_bytes(total, precision) for precision in ("fp32", "mixed")},
        "adamw_bytes_per_step": adamw_bytes(total),
    }
    if not isinstance(model, Shape):
        return result
    context = model.n_positions if context is None else context
    if not 1 <= context <= model.n_positions:
        raise ValueError(f"context must be in [1, {model.n_positions}], the positions of {name}, not {context}")
    flops = forward_flops(model, context)
    return result | {
        "shape": {**dataclasses.asdict(model), "n_inner": model.hidden_width},
        "batch": batch,
        "context": context,
        "weight_bytes": weight_bytes(model),
        "kv_cache_bytes": {"token": kv_cache_bytes(model), "batch": kv_cache_bytes(model, context, batch=batch)},
        "activation_bytes": {
            "fp32": _activation_totals(model, batch, context, element_bytes=4),
            "mixed": _activation_totals(model, batch, context, element_bytes=2),
        },
        "saved_for_backward": {precision: _saved(model, batch, context, precision) for precision in PRECISIONS},
        "flops": {
            "forward_per_sequence": flops,
            "forward_per_token": flops / context,
            "training_per_token": training_flops(model, context) / context,
        },
        "ceilings": {
            "bandwidth": bandwidth,
            "matrix_rate": matrix_rate,
            **_decode_ceilings(model, bandwidth, batch, context),
            "prefill_tokens_per_s": prefill_ceiling(model, matrix_rate, context),
            "training_tokens_per_s": training_ceiling(model, matrix_rate, context),
        },
    }


def _decode_ceilings(model: Shape, bandwidth: float, batch: int, context: int) -> dict[str, float]:
    """Bytes and tokens/s of a decode step, with weights in bf16, int8 and int4, without and with the head."""
    kinds: dict[str, dict[str, int]] = {"": {}}
    for bits in roundings(model):
        kinds |= {f"int{bits}_": {"block_bits": bits}, f"int{bits}_head_": {"block_bits": bits, "head_bits": bits}}
    found: dict[str, float] = {}
    for kind, weights in kinds.items():
        found[f"{kind}decode_bytes_per_step"] = decode_bytes(model, batch, context, **weights)
        found[f"{kind}decode_tokens_per_s"] = decode_ceiling(model, bandwidth, batch, context, **weights)
    return found


def _activation_totals(shape: Shape, batch: int, tokens: int, *, element_bytes: int) -> dict[str, int]:
    variants = {
        "kept, chunked loss": {},
        "kept, full logits": {"full_logits": True},
        "norms computed again, chunked loss": {"recompute_norms": True},
        "checkpointed, chunked loss": {"checkpointing": True},
        "checkpointed, full logits": {"checkpointing": True, "full_logits": True},
    }
    return {
        variant: sum(activation_bytes(shape, batch, tokens, element_bytes=element_bytes, **flags).values())
        for variant, flags in variants.items()
    }


def _saved(shape: Shape, batch: int, tokens: int, precision: str) -> dict[str, dict[str, int]]:
    """What the kernels save: of a token in each layer by tensor (with dropout), and in the whole model."""
    variants = {
        "kept": {},
        "kept, dropout": {"dropout": True},
        "with norms computed again": {"recompute_norms": True},
        "with norms computed again, dropout": {"recompute_norms": True, "dropout": True},
        "checkpointed": {"checkpointing": True},
        "checkpointed, dropout": {"checkpointing": True, "dropout": True},
    }
    return {
        "token_and_layer": layer_saved_bytes(shape, precision, dropout=True),
        "token_and_layer_norms_computed_again": layer_saved_bytes(shape, precision, dropout=True, recompute_norms=True),
        "model": {
            variant: sum(saved_bytes(shape, batch, tokens, precision, **flags).values())
            for variant, flags in variants.items()
        },
    }
