"""A report as tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def render(report: dict[str, Any], console: Console) -> None:
    """Print a report as tables on a rich console."""
    console.print(_parameter_table(report))
    if "shape" in report:
        sizes = [f"{letter} = {report['shape'][field]}" for letter, field in _LETTERS.items()]
        console.print(", ".join(sizes), highlight=False)
    console.print(_memory_table(report))
    if "saved_for_backward" in report:
        console.print(_saved_table(report))
    if "ceilings" in report:
        console.print(_speed_table(report))


_LETTERS = {"L": "n_layer", "C": "n_embd", "H": "n_head", "F": "n_inner", "V": "vocab_size", "P": "n_positions"}


def _table(title: str, **headings: Any) -> Table:
    table = Table(title=title, title_justify="left")
    for heading, justify in headings.items():
        table.add_column(heading, justify=justify, overflow="fold")
    return table


def _parameter_table(report: dict[str, Any]) -> Table:
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


def _memory_table(report: dict[str, Any]) -> Table:
    table = _table("Memory", what="left", bytes="right", short="right")

    def add(what: str, size: int) -> None:
        table.add_row(what, f"{size:,}", f"{_short(size)}B")

    labels = {
        "int8": "int8 (products of the blocks, with fp32 scales per column; the rest bf16)",
        "int8_head": "int8, and so the head, beside the token table in bf16",
        "int4": "int4 (the same, with a byte for each group of 64 weights)",
        "int4_head": "int4, and so the head, beside the token table in bf16",
    }
    for precision, size in report["weight_bytes"].items():
        add(f"weights, {labels.get(precision, precision)}", size)
    if "kv_cache_bytes" in report:
        add("keys and values of one token, bf16", report["kv_cache_bytes"]["token"])
        add(f"keys and values of {report['batch']} x {report['context']} tokens", report["kv_cache_bytes"]["batch"])
    for precision, parts in report["training_state_bytes"].items():
        table.add_section()
        held = [part.replace("_", " ") for part, size in parts.items() if size]
        add(f"training, {precision}: {', '.join(held)}", sum(parts.values()))
        for variant, size in report.get("activation_bytes", {}).get(precision, {}).items():
            add(f"activations in torch, {variant}, {report['batch']} x {report['context']} tokens", size)
    return table


def _saved_table(report: dict[str, Any]) -> Table:
    precisions = report["saved_for_backward"]
    table = _table(
        "Bytes that the kernels save for backward, without logits", what="left", **dict.fromkeys(precisions, "right")
    )

    def add(what: str, sizes: list[int]) -> None:
        table.add_row(what, *(f"{size:,}" for size in sizes))

    layers = [saved["token_and_layer"] for saved in precisions.values()]
    for tensor in layers[0]:
        add(f"a token in each layer: {tensor}", [layer[tensor] for layer in layers])
    table.add_section()
    smaller = [saved["token_and_layer_norms_computed_again"] for saved in precisions.values()]
    for how, of_each in {"": layers, ", norms computed again": smaller}.items():
        for dropout in ("without", "with"):
            masks = [layer["dropout mask"] if dropout == "without" else 0 for layer in of_each]
            sizes = [sum(layer.values()) - mask for layer, mask in zip(of_each, masks, strict=True)]
            add(f"a token in each layer, {dropout} dropout{how}", sizes)
    table.add_section()
    models = [saved["model"] for saved in precisions.values()]
    for variant in models[0]:
        add(
            f"the model {variant}, {report['batch']} x {report['context']} tokens", [model[variant] for model in models]
        )
    return table


def _speed_table(report: dict[str, Any]) -> Table:
    flops, ceilings, context = report["flops"], report["ceilings"], report["context"]
    limits = f"at {_short(ceilings['bandwidth'])}B/s and {_short(ceilings['matrix_rate'])}FLOP/s"
    table = _table(f"Work and speed limits in bf16, {limits}", what="left", work="right", ceiling="right")

    def tokens_per_s(kind: str) -> str:
        return f"{_short(ceilings[f'{kind}_tokens_per_s'])} tokens/s"

    decode = f"decode, batch {report['batch']}, context {context}"
    kinds = {"decode": ""}
    for kind in ("int8", "int4"):
        kinds |= {f"{kind}_decode": f", {kind} weights", f"{kind}_head_decode": f", {kind} weights and head"}
    for kind, weights in kinds.items():
        if f"{kind}_bytes_per_step" not in ceilings:
            continue
        table.add_row(decode + weights, f"{_short(ceilings[f'{kind}_bytes_per_step'])}B a step", tokens_per_s(kind))
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
