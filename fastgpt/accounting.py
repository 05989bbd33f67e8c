"""Storage, FLOPs and speed limits of GPT-2 at any size, from closed formulas: nothing is built or run.

In the formulas: L layers, C channels, H heads, F hidden width of the MLP, V vocabulary, B batch, T tokens. Counts are
exact integers. Cross-attention has parameters, but its work depends on the encoder: FLOPs, caches, activations and
speed limits are those of a decoder that was given no encoder states.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from .parameters import PRESETS, ParameterCount, Shape, Source, count_parameters, describe, shape_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["PRESETS", "ParameterCount", "Shape", "count_parameters", "render", "report", "shape_of"]

# Measured on one H200: a large copy (bytes/s) and a large bf16 matrix product (FLOP/s).
H200_BANDWIDTH = 4.3e12
H200_MATRIX_RATE = 7.9e14

# --- memory ---------------------------------------------------------------------------------------------------------


def weight_bytes(shape: Shape) -> dict[str, int]:
    """Bytes of the weights in fp32, bf16 and int8.

    int8: the matrices of every product (attention, cross-attention, MLP, and the head, whose table a tied token
    embedding reads too) in int8 with one fp32 scale per output column; everything else in bf16.
    """
    C, F, V = shape.n_embd, shape.hidden_width, shape.vocab_size
    n_attentions = 2 if shape.cross_attention else 1
    n_matrix = shape.n_layer * (n_attentions * 4 * C**2 + 2 * C * F) + V * C
    n_columns = shape.n_layer * (n_attentions * 4 * C + F + C) + V
    total = count_parameters(shape).total
    return {"fp32": 4 * total, "bf16": 2 * total, "int8": n_matrix + 4 * n_columns + 2 * (total - n_matrix)}


def kv_cache_bytes(shape: Shape, tokens: int = 1, *, batch: int = 1, element_bytes: int = 2) -> int:
    """Bytes of the keys and values of `tokens` tokens in each sequence: 2*L*C elements a token."""
    return batch * tokens * 2 * shape.n_layer * shape.n_embd * element_bytes


def training_state_bytes(n_parameters: int, precision: str = "fp32") -> dict[str, int]:
    """Bytes that training with AdamW holds whatever the batch, by part.

    precision: "fp32", or "mixed" for bf16 weights and gradients with a master copy and moments in fp32: both come to
    16 bytes a parameter. Raises ValueError on another.
    """
    sizes = {
        "fp32": {"weights": 4, "gradients": 4, "master_weights": 0, "moments": 8},
        "mixed": {"weights": 2, "gradients": 2, "master_weights": 4, "moments": 8},
    }
    if precision not in sizes:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(sizes)}")
    return {part: size * n_parameters for part, size in sizes[precision].items()}


def activation_bytes(
    shape: Shape,
    batch: int,
    tokens: int,
    *,
    element_bytes: int = 2,
    checkpointing: bool = False,
    full_logits: bool = False,
) -> dict[str, int]:
    """Bytes that a training step without dropout keeps from forward to backward, by part.

    A row is one token of one sequence. A block keeps 8*C + 2*F elements a row: its input, the normalised input, q, k,
    v, the attended values, the sum with the residual and its normalised form, and the MLP before and after its
    activation; and 4 + H statistics a row in fp32: mean and reciprocal deviation of two norms, the log-sum-exp of
    each head. No (T, T) scores are kept.
    checkpointing: blocks keep only their input, and one at a time is computed again in backward.
    full_logits: the loss keeps its normalised input, the logits, their log-softmax in fp32, and the labels. Else
    `linear_cross_entropy` keeps its input and the labels, from which second derivatives are computed, the gradient of
    its input and, in fp32, that of the (V, C) table.
    Temporaries that live within one operation, forward or backward, are not counted; nor is the fp32 copy that a CPU
    makes to normalise bf16.
    """
    C, F, V, L = shape.n_embd, shape.hidden_width, shape.vocab_size, shape.n_layer
    rows = batch * tokens
    stream = rows * C * element_bytes
    block = rows * ((8 * C + 2 * F) * element_bytes + (4 + shape.n_head) * 4)
    return {
        "token_and_position_ids": 8 * (rows + tokens),
        "blocks": L * (stream if checkpointing else block),
        "block_computed_again": block - stream if checkpointing else 0,
        "final_norm": stream + 8 * rows,
        "loss": stream + 8 * rows + (rows * V * (element_bytes + 4) if full_logits else stream + 4 * V * C),
    }


# --- FLOPs and bytes moved ------------------------------------------------------------------------------------------


def forward_flops(shape: Shape, tokens: int) -> int:
    """FLOPs of the matrix products for one sequence, with all logits: 24*T*L*C^2 + 2*T*(T+1)*L*C + 2*T*V*C.

    The 24 is 8 for attention's own matrices and 4*F/C for the MLP. Attention is causal: query i meets i keys, (T+1)/2
    on average, where a product that ignores the mask meets T.
    """
    C, L = shape.n_embd, shape.n_layer
    blocks = tokens * L * (8 * C**2 + 4 * C * shape.hidden_width)
    return blocks + 2 * tokens * (tokens + 1) * L * C + 2 * tokens * shape.vocab_size * C


def training_flops(shape: Shape, tokens: int) -> int:
    """FLOPs of forward and backward for one sequence: a product has two in backward. Nothing is computed again."""
    return 3 * forward_flops(shape, tokens)


def adamw_bytes(n_parameters: int) -> int:
    """Bytes that an fp32 AdamW step moves: weight, gradient and two moments read, all but the gradient written."""
    return 28 * n_parameters


def decode_bytes(shape: Shape, batch: int, context: int, *, element_bytes: int = 2) -> int:
    """Bytes read to decode one token of each sequence: every weight once, and the keys and values of the context.

    Weights: L*(12*C^2 + 13*C) + 2*C + V*C elements, where 12*C^2 + 13*C stands for 4*C^2 + 2*C*F + 9*C + F.
    """
    C, F = shape.n_embd, shape.hidden_width
    n_weights = shape.n_layer * (4 * C**2 + 2 * C * F + 9 * C + F) + 2 * C + shape.vocab_size * C
    return n_weights * element_bytes + kv_cache_bytes(shape, context, batch=batch, element_bytes=element_bytes)


# --- ceilings -------------------------------------------------------------------------------------------------------


def decode_ceiling(shape: Shape, bandwidth: float, batch: int, context: int, *, element_bytes: int = 2) -> float:
    """Tokens/s of the whole batch when decoding waits only for memory. bandwidth: bytes/s."""
    return batch * bandwidth / decode_bytes(shape, batch, context, element_bytes=element_bytes)


def prefill_ceiling(shape: Shape, matrix_rate: float, tokens: int) -> float:
    """Tokens/s of a forward pass, all logits included, that waits only for products. matrix_rate: FLOP/s."""
    return tokens * matrix_rate / forward_flops(shape, tokens)


def training_ceiling(shape: Shape, matrix_rate: float, tokens: int) -> float:
    """Tokens/s of forward and backward that wait only for products. matrix_rate: FLOP/s."""
    return tokens * matrix_rate / training_flops(shape, tokens)


# --- report ---------------------------------------------------------------------------------------------------------


def report(
    source: Source,
    *,
    bandwidth: float = H200_BANDWIDTH,
    matrix_rate: float = H200_MATRIX_RATE,
    batch: int = 1,
    context: int | None = None,
) -> dict[str, Any]:
    """Everything above for one model, ready for JSON; "total" is the exact number of parameters.

    source: as for `count_parameters`. bandwidth: bytes/s. matrix_rate: FLOP/s. batch, context: sequences and their
    tokens, for caches, activations and speed limits (in bf16); the whole context when None.
    What is not a GPT-2, and a module, has parameters, weights and training state only.
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
        "flops": {
            "forward_per_sequence": flops,
            "forward_per_token": flops / context,
            "training_per_token": training_flops(model, context) / context,
        },
        "ceilings": {
            "bandwidth": bandwidth,
            "matrix_rate": matrix_rate,
            "decode_bytes_per_step": decode_bytes(model, batch, context),
            "decode_tokens_per_s": decode_ceiling(model, bandwidth, batch, context),
            "prefill_tokens_per_s": prefill_ceiling(model, matrix_rate, context),
            "training_tokens_per_s": training_ceiling(model, matrix_rate, context),
        },
    }


def _activation_totals(shape: Shape, batch: int, tokens: int, *, element_bytes: int) -> dict[str, int]:
    variants = {
        "kept, chunked loss": {},
        "kept, full logits": {"full_logits": True},
        "checkpointed, chunked loss": {"checkpointing": True},
        "checkpointed, full logits": {"checkpointing": True, "full_logits": True},
    }
    return {
        variant: sum(activation_bytes(shape, batch, tokens, element_bytes=element_bytes, **flags).values())
        for variant, flags in variants.items()
    }


def render(report: dict[str, Any], console: "Console") -> None:
    """Print a report as tables on a rich console."""
    console.print(_parameter_table(report))
    if "shape" in report:
        sizes = [f"{letter} = {report['shape'][field]}" for letter, field in _LETTERS.items()]
        console.print(", ".join(sizes), highlight=False)
    console.print(_memory_table(report))
    if "ceilings" in report:
        console.print(_speed_table(report))


_LETTERS = {"L": "n_layer", "C": "n_embd", "H": "n_head", "F": "n_inner", "V": "vocab_size", "P": "n_positions"}


def _table(title: str, **headings: Any) -> "Table":
    # Importing fastgpt should not wait for rich.
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading, justify in headings.items():
        table.add_column(heading, justify=justify, overflow="fold")
    return table


def _parameter_table(report: dict[str, Any]) -> "Table":
    table = _table(
        f"Parameters of {report['model']}",
        component="left",
        formula="left",
        each="right",
        count="right",
        parameters="right",
        share="right",
    )
    for part in report["components"]:
        counts = f"{part['each']:,}", str(part["count"]), f"{part['subtotal']:,}", f"{part['share']:.1%}"
        table.add_row(part["name"], part["formula"], *counts)
    table.add_section()
    table.add_row("total", "", "", "", f"{report['total']:,}", "100.0%")
    return table


def _memory_table(report: dict[str, Any]) -> "Table":
    table = _table("Memory", what="left", bytes="right", short="right")

    def add(what: str, size: int) -> None:
        table.add_row(what, f"{size:,}", f"{_short(size)}B")

    for precision, size in report["weight_bytes"].items():
        scales = " (matrices, with fp32 scales per column; the rest bf16)" if precision == "int8" else ""
        add(f"weights, {precision}{scales}", size)
    if "kv_cache_bytes" in report:
        add("keys and values of one token, bf16", report["kv_cache_bytes"]["token"])
        add(f"keys and values of {report['batch']} x {report['context']} tokens", report["kv_cache_bytes"]["batch"])
    for precision, parts in report["training_state_bytes"].items():
        table.add_section()
        held = [part.replace("_", " ") for part, size in parts.items() if size]
        add(f"training, {precision}: {', '.join(held)}", sum(parts.values()))
        for variant, size in report.get("activation_bytes", {}).get(precision, {}).items():
            add(f"activations {variant}, {report['batch']} x {report['context']} tokens", size)
    return table


def _speed_table(report: dict[str, Any]) -> "Table":
    flops, ceilings, context = report["flops"], report["ceilings"], report["context"]
    limits = f"at {_short(ceilings['bandwidth'])}B/s and {_short(ceilings['matrix_rate'])}FLOP/s"
    table = _table(f"Work and speed limits in bf16, {limits}", what="left", work="right", ceiling="right")

    def tokens_per_s(kind: str) -> str:
        return f"{_short(ceilings[f'{kind}_tokens_per_s'])} tokens/s"

    decode = f"decode, batch {report['batch']}, context {context}"
    table.add_row(decode, f"{_short(ceilings['decode_bytes_per_step'])}B a step", tokens_per_s("decode"))
    forward, training = _short(flops["forward_per_token"]), _short(flops["training_per_token"])
    table.add_row(f"prefill, {context} tokens, all logits", f"{forward}FLOP a token", tokens_per_s("prefill"))
    table.add_row(f"training step, {context} tokens", f"{training}FLOP a token", tokens_per_s("training"))
    step_s = report["adamw_bytes_per_step"] / ceilings["bandwidth"]
    table.add_row("AdamW, fp32", f"{_short(report['adamw_bytes_per_step'])}B a step", f"{_short(1 / step_s)} steps/s")
    return table


def _short(value: float) -> str:
    """Three digits and a decimal prefix: 16154 -> "16.2 k"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
