"""The four workloads of GPT-2 small whose time is predicted, kernel by kernel.

Each part is executed at small sizes. Its counts are a sum of terms, such as (tokens, tokens^2) for causal attention,
whose factors follow from as many executed cases as there are terms; the terms of the wanted size then give its counts.
Loops count linearly in what they walk, so this is exact but for the edges of tiles.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from fastgpt_kernels.audit import shipped
from fastgpt_kernels.operations.attention.op import causal_attention
from fastgpt_kernels.operations.decode_step.op import DecodeStep
from fastgpt_kernels.operations.gelu_mlp import tiles as mlp_tiles
from fastgpt_kernels.operations.gelu_mlp.op import gelu_mlp
from fastgpt_kernels.operations.layer_norm.op import add_layer_norm, layer_norm
from fastgpt_kernels.operations.linear_cross_entropy.op import linear_cross_entropy
from torch import Tensor

C, H, D, F, V, L = 768, 12, 64, 3072, 50257, 12
CONTEXT = 512  # of a decode step
_MULTIPROCESSORS = 132


class Part(NamedTuple):
    """A call in a workload.

    times: how often in the workload. run: takes sizes as keywords. tried: sizes that are executed, on a GPU of so many
    `multiprocessors`. terms: of sizes. due: the arguments of the launches that differ at the wanted size.
    """

    workload: str
    times: int
    run: Callable[..., object]
    tried: Sequence[dict[str, int]]
    wanted: dict[str, int]
    terms: Callable[..., tuple[float, ...]]
    due: dict[str, dict[str, int]]
    multiprocessors: int = 4
    kernels: str = ""  # a pattern of their names


def _new(*shape: int, gradient: bool) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(gradient)


def _norm(rows: int, residual: bool, gradient: bool) -> None:
    x, more, weight, bias = (_new(*n, C, gradient=gradient) for n in ((rows,), (rows,), (), ()))
    outputs = add_layer_norm(x, more, weight, bias) if residual else (layer_norm(x, weight, bias),)
    if gradient:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def _attention(tokens: int, dropout_p: float, gradient: bool) -> None:
    y = causal_attention(*(_new(1, 1, tokens, D, gradient=gradient) for _ in range(3)), dropout_p=dropout_p, seed=0)
    if gradient:
        y.sum().backward()


def _mlp(rows: int, narrow: int, wide: int, dropout_p: float, gradient: bool) -> None:
    """An MLP whose widths need not be those of a GPT-2."""
    x, fc, fc_bias, proj, proj_bias, residual = (
        _new(*shape, gradient=gradient)
        for shape in ((rows, narrow), (narrow, wide), (wide,), (wide, narrow), (narrow,), (rows, narrow))
    )
    options = {"residual": residual, "dropout_p": dropout_p, "seed": 0} if gradient else {}
    y = gelu_mlp(x, fc, fc_bias, proj, proj_bias, "gelu_new", **options)
    if gradient:
        y.sum().backward()


def _loss(rows: int) -> None:
    hidden, weight = _new(rows, 16, gradient=True), _new(V, 16, gradient=True)
    linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.int64)).backward()


def _decode(rows: int, vocabulary: int) -> None:
    shipped._VOCABULARY = vocabulary
    weights = shipped._decode_weights(C, H, torch.bfloat16)
    cache, tokens, positions, slots, starts, logits = shipped._decode_state(C, H, rows, rows, torch.bfloat16)
    positions[:], slots[:] = CONTEXT, CONTEXT
    step = DecodeStep(weights, rows, shipped._CONTEXT)
    step.decode(weights, cache, tokens, positions, slots, starts, logits)


def _decode_products(rows: int) -> None:
    """The products of a layer whose norms are kernels of their own, and the norm that adds the most partial sums."""
    weights = shipped._decode_weights(C, H, torch.bfloat16)
    layer, step = weights.layers[0], DecodeStep(weights, rows, shipped._CONTEXT)
    step._product(step.normalised, layer.qkv_weight, layer.qkv_bias, "none", step.qkv)
    step._project(step.mixed, 1, layer.proj_weight)
    step._product(step.normalised, layer.fc_weight, layer.fc_bias, weights.activation, step.hidden)
    n_parts = step._project(step.hidden, 1, layer.mlp_proj_weight)
    step._norm(step.streams[0], n_parts, layer.mlp_proj_bias, step.streams[1], layer.ln_1_weight, layer.ln_1_bias)


# Rows and widths of the MLP: each term changes in one of them. None makes a product large on two multiprocessors.
_MLP_SIZES = [
    {"rows": 256, "narrow": 128, "wide": 256}, {"rows": 512, "narrow": 128, "wide": 256},
    {"rows": 256, "narrow": 256, "wide": 256}, {"rows": 256, "narrow": 128, "wide": 512},
]  # fmt: skip
# All products are large on one multiprocessor.
_LARGE_MLP_SIZES = [
    {"rows": 384, "narrow": 256, "wide": 256}, {"rows": 768, "narrow": 256, "wide": 256},
    {"rows": 384, "narrow": 512, "wide": 256}, {"rows": 384, "narrow": 256, "wide": 512},
]  # fmt: skip


def parts() -> Iterator[Part]:
    yield from _forward("prefill 1 x 1024", 1024, 0.0, gradient=False)
    yield from _decode_parts()
    yield from _forward("training 16 x 1024", 16 * 1024, 0.1, gradient=True)
    loss_due = {"": {"n_cols": V}}
    yield Part("training 16 x 1024", 1, _loss, [{"rows": 1}], {"rows": 16 * 1024}, lambda rows: (rows,), loss_due)


def _forward(workload: str, rows: int, dropout_p: float, gradient: bool) -> Iterator[Part]:
    """Norms, attention and MLP of a forward pass, with backward where there are gradients."""
    # A slice of the GPU: a part of its multiprocessors with the same part of the rows.
    share = 4 / _MULTIPROCESSORS if gradient else 1 / 16
    some = [{"rows": round(rows * share) // 16 * 16}]
    for residual, times in ((False, 1), (True, 2 * L)):
        yield Part(
            workload, times, lambda rows, residual=residual: _norm(rows, residual, gradient),
            some, {"rows": rows}, lambda rows: (rows,), {"": {"n_rows": rows}}, kernels="layer_norm_fwd",
        )  # fmt: skip
        if gradient:
            yield Part(
                workload, times, lambda rows, residual=residual: _norm(rows, residual, True),
                some, {"rows": rows}, lambda rows: (rows,), {"": {"n_rows": rows}}, kernels="layer_norm_bwd_kernel",
            )  # fmt: skip
    n_heads = rows // 1024 * H
    heads = {"": {"n_batch_heads": n_heads, "n_queries": 1024}, "fwd": {"n_keys": 1024}}
    yield Part(
        workload, L, lambda tokens: _attention(tokens, dropout_p, gradient), [{"tokens": 256}, {"tokens": 512}],
        {"tokens": 1024, "heads": n_heads}, lambda tokens, heads=1: (heads * tokens, heads * tokens**2), heads,
    )  # fmt: skip
    yield Part(
        workload, L, lambda **sizes: _mlp(**sizes, dropout_p=dropout_p, gradient=gradient),
        _LARGE_MLP_SIZES if gradient else _MLP_SIZES, {"rows": rows, "narrow": C, "wide": F},
        lambda rows, narrow, wide: (rows * narrow * wide, rows * wide, rows * narrow), _mlp_due(rows),
        1 if gradient else 2, "fwd|bwd_pre",
    )  # fmt: skip
    if gradient:  # Of each column, a program walks over its tiles of rows and joins their sums once.
        yield Part(
            workload, L, lambda rows, programs: _mlp(rows, 128, 128, dropout_p, gradient),
            [{"rows": 256, "programs": 4}, {"rows": 1024, "programs": 4}],
            {"rows": rows * C // 128, "programs": _mlp_due(rows)["bwd_product"]["n_programs"]},
            lambda rows, programs: (rows, programs), _mlp_due(rows), 1, "bwd_product",
        )  # fmt: skip


def _mlp_due(rows: int) -> dict[str, dict[str, int]]:
    """Resident programs walk over tiles, and four on a multiprocessor over rows."""

    def product(kernel: str, n_cols: int, n_inner: int) -> dict[str, int]:
        tile = mlp_tile(kernel, rows, n_cols, _MULTIPROCESSORS)
        n_tiles = -(-rows // tile.block_rows) * -(-n_cols // tile.block_cols)
        n_programs = min(tile.n_resident * _MULTIPROCESSORS, n_tiles)
        return {"n_rows": rows, "n_cols": n_cols, "n_inner": n_inner, "n_programs": n_programs}

    out = product("out", C, F)
    return {
        "hidden": product("hidden", F, C), "bwd_pre": product("pre", F, C), "fwd_out": out,
        "bwd_product": out | {"n_programs": 4 * _MULTIPROCESSORS},
    }  # fmt: skip


def mlp_tile(kernel: str, n_rows: int, n_cols: int, n_multiprocessors: int) -> mlp_tiles.ProductTile:
    """The tile of a product of the MLP in bfloat16."""
    large = mlp_tiles.is_large_product(n_rows, n_cols, n_multiprocessors)
    return mlp_tiles.product_tile(kernel, 2, 2, "sm_90", True, large)


def _decode_parts() -> Iterator[Part]:
    step, wanted = [{"rows": 1, "vocabulary": 1041}, {"rows": 1, "vocabulary": 2081}], {"rows": 1, "vocabulary": V}
    for kernels, times in (("embed", 1), ("norm_product", L), ("attention", L), ("project", L)):
        yield Part(
            "decode, batch 1", times, _decode, step[:1], wanted, lambda rows, vocabulary: (1,),
            {"attention": {"n_keys": CONTEXT + 1}}, kernels=kernels,
        )  # fmt: skip
    # Two programs on a multiprocessor walk over the vocabulary; each begins with the norm.
    yield Part(
        "decode, batch 1", 1, _decode, step, wanted | {"multiprocessors": _MULTIPROCESSORS},
        lambda rows, vocabulary, multiprocessors=4: (vocabulary, multiprocessors), {"": {"n_out": V}}, kernels="head",
    )  # fmt: skip
    yield Part(
        "decode, batch 64", L, _decode, [{"rows": 9, "vocabulary": 1041}], {"rows": 64, "vocabulary": 1041},
        lambda rows, vocabulary: (rows,), {"": {"n_keys": CONTEXT + 1}}, kernels="attention",
    )  # fmt: skip
    for kernels, times in (("norm", 2 * L + 1), ("product", L)):
        yield Part(
            "decode, batch 64", times, _decode_products, [{"rows": 64}], {"rows": 64},
            lambda rows: (rows,), {"": {}}, kernels=kernels,
        )  # fmt: skip


def scaled(executed: Sequence[Counter], terms: Sequence[tuple[float, ...]], wanted: tuple[float, ...]) -> Counter:
    """Counts at the wanted terms, from those of executed cases."""
    names = sorted(set().union(*executed))
    known = np.array([[counts[name] for name in names] for counts in executed], float)
    factors = np.linalg.lstsq(np.array(terms, float), known, rcond=None)[0]
    return Counter({name: max(0.0, n) for name, n in zip(names, np.array(wanted) @ factors, strict=True)})
