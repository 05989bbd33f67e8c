"""causal_attention as fused kernels: the public function, launchers, autograd and registration with torch.

Forward saves `stats` (2, B, H, Tq) in float32: each query's largest scaled score and the log2 of its sum of
exponentials, or for float32 inputs the inverse of that sum. Every new tensor is a (B, H, T, D) view of (B, T, H, D)
memory, so that `transpose(1, 2).reshape(B, T, C)` copies nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...common import chip
from ...common.arithmetic import LOG2_E
from ...common.dropout import dropout_threshold, own_seed
from ...common.launch import Launch, cdiv, eager_or_registered, launching
from ...common.precision import as_autocast, product_precision
from ...common.second_order import formula_gradients, twice_differentiable
from . import packed, tiles
from .backward_kernels import (
    _causal_attention_bwd_delta_kernel,
    _causal_attention_bwd_dkdv_kernel,
    _causal_attention_bwd_dq_kernel,
)
from .kernels import _causal_attention_fwd_kernel
from .reference import causal_attention as formula
from .reference import check_attention_arguments, split_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """softmax(scale * q @ k^T) @ v, where a query sees the keys up to its own position.

    q: (B, H, Tq, D), k, v: (B, H, Tk, D) in float32, bfloat16 or float16, D at most 128, with any strides; a tensor
    whose last axis is not dense is copied. The rest as in `reference.causal_attention`, with bitwise the same dropout.
    Returns (B, H, Tq, D), a view of (B, Tq, H, D) memory.
    Raises ValueError when shapes, dtypes or devices do not fit, and for other dtypes and wider heads.
    Source: FlashAttention-2, arXiv 2307.08691.
    """
    check_attention_arguments(q, k, v, key_padding_mask, dropout_p)
    q, k, v = map(as_autocast, (q, k, v))
    _check_kernel_arguments(q, k, v, key_padding_mask)
    if q.numel() == 0:
        return q.clone()
    scale = math.pow(q.shape[-1], -0.5) if scale is None else scale
    if scale <= 0.0:  # The kernels find a row's largest score before they scale it.
        q, scale = (q * 0.0, 1.0) if scale == 0.0 else (-q, -scale)
    drop_seed = own_seed(seed, q.device) if dropout_p > 0.0 else None
    implementation = eager_or_registered(causal_attention_fwd, _CausalAttention, _causal_attention_op)
    return implementation(q, k, v, key_padding_mask, drop_seed, scale, dropout_p)[0]


def supports(q: Tensor) -> bool:
    """Whether the kernels take queries of this dtype and head size."""
    return q.dtype in DTYPES and q.shape[-1] <= MAX_HEAD_DIM


def _check_kernel_arguments(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"causal_attention: q, k and v must share one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    for tensor in (k, v, key_padding_mask):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"causal_attention: all tensors must be on {q.device}, not on {tensor.device}")
    if not supports(q):
        raise ValueError(
            f"causal_attention: no kernel for {q.dtype} with heads of {q.shape[-1]}: it takes float32, bfloat16 and "
            f"float16 up to {MAX_HEAD_DIM}; use fastgpt_kernels.reference"
        )


# --- launchers ------------------------------------------------------------------------------------------------------


def _new_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) over (B, T, H, D) memory, of x's shape and dtype."""
    n_batch, n_heads, n_tokens, head_dim = x.shape
    strides = n_tokens * n_heads * head_dim, head_dim, n_heads * head_dim, 1
    return x.new_empty_strided((n_batch, n_heads, n_tokens, head_dim), strides)


def _new_stats(q: Tensor) -> Tensor:
    return q.new_empty((2, *q.shape[:3]), dtype=torch.promote_types(q.dtype, torch.float32))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _mask_bytes(key_padding_mask: Tensor | None) -> Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)


def _strides(**tensors: Tensor) -> dict[str, Any]:
    """A kernel's stride arguments, `<name>_batch_stride` and so on; the last axis is dense."""
    axes = "batch", "head", "token"
    return {f"{name}_{axis}_stride": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}


def _sizes(q: Tensor, k: Tensor) -> dict[str, Any]:
    n_batch, n_heads, n_queries, _ = q.shape
    return {"n_batch_heads": n_batch * n_heads, "n_heads": n_heads, "n_queries": n_queries, "n_keys": k.shape[2]}


def _scores(q: Tensor, scale: float, dropout_p: float) -> dict[str, Any]:
    """The arguments with which a kernel scales and drops. score_scale: to units of log2 in half precision."""
    threshold = dropout_threshold(dropout_p)
    return {
        "score_scale": scale * LOG2_E.value if q.element_size() == 2 else scale,
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold),
    }


def padded_dim(head_dim: int) -> int:
    """The width of a tile that holds a head: a power of two, and at least 16, which matrix instructions need."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _tile(
    kernel: str, q: Tensor, key_padding_mask: Tensor | None, seed: Tensor | None, precision: str
) -> dict[str, Any]:
    head_dim, architecture = q.shape[-1], chip.architecture(q.device)
    tile = tiles.attention_tile(kernel, head_dim, q.element_size(), architecture, seed is not None, precision)
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim(head_dim),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "HAS_KEY_MASK": key_padding_mask is not None,
        "HAS_DROPOUT": seed is not None,
        "PRECISION": precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def causal_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (B, H, Tq, D) and stats (2, B, H, Tq)."""
    out, stats = _new_heads(q), _new_stats(q)
    _launch_forward(q, k, v, key_padding_mask, seed, out, stats, scale, dropout_p, product_precision(q))
    return out, stats


@launching
def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, seed: Tensor | None, out: Tensor, stats: Tensor,
    scale: float, dropout_p: float, precision: str,
) -> Iterator[Launch]:  # fmt: skip
    """Fill out and stats."""
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    sizes, tile = _sizes(q, k), _tile("fwd", q, key_padding_mask, seed, precision)
    n_programs = cdiv(q.shape[2], tile["BLOCK_Q"]) * sizes["n_batch_heads"]
    yield Launch(
        _causal_attention_fwd_kernel, n_programs,
        q, k, v, _mask_bytes(key_padding_mask), seed, out, stats[0], stats[1],
        **_strides(q=q, k=k, v=v), **sizes, **_scores(q, scale, dropout_p), **tile,
    )  # fmt: skip


def causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor,
    key_padding_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (B, H, Tq, D), dk and dv (B, H, Tk, D).

    Saved tensors may have other strides than in forward, because a saved-tensor hook may have repacked them.
    """
    new = _new_heads(q), _new_heads(k), _new_heads(v)
    return _fill_gradients(new, dout, q, k, v, out, stats, key_padding_mask, seed, scale, dropout_p)


def _bwd_in_one_tensor(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_attention_bwd`; if q, k and v are views of one tensor (`packed`), so are their gradients."""
    if not packed.are_packed(q, k, v):
        return causal_attention_bwd(dout, q, k, v, *more)
    n_batch, n_heads, n_tokens, head_dim = q.shape
    new = split_heads(q.new_empty((n_batch, n_tokens, 3, n_heads, head_dim)))
    return _fill_gradients(new, dout, q, k, v, *more)


def _fill_gradients(
    gradients: tuple[Tensor, Tensor, Tensor], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor,
    key_padding_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fill dq, dk and dv, whose tokens may lie any stride apart, and return them."""
    stats = stats.contiguous()
    delta = stats.new_empty(stats.shape[1:])
    _launch_backward(
        dout, q, k, v, out, stats, key_padding_mask, seed, delta, *gradients, scale, dropout_p, product_precision(q)
    )
    return gradients


@launching
def _launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor,
    key_padding_mask: Tensor | None, seed: Tensor | None, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float, dropout_p: float, precision: str,
) -> Iterator[Launch]:  # fmt: skip
    """Fill dq, dk and dv, as `_new_heads` or all `packed`. delta: (B, H, Tq), to be filled as well."""
    q, k, v, dout, out = (_dense_rows(x) for x in (q, k, v, dout, out))
    sizes, scores, mask = _sizes(q, k), _scores(q, scale, dropout_p), _mask_bytes(key_padding_mask)
    tile, k_tile = (_tile(kernel, q, mask, seed, precision) for kernel in ("dq", "dkdv"))
    n_q_programs = cdiv(q.shape[2], tile["BLOCK_Q"]) * sizes["n_batch_heads"]
    n_k_programs = cdiv(k.shape[2], k_tile["BLOCK_K"]) * sizes["n_batch_heads"]
    if q.element_size() == 2:  # In wider dtypes the dq kernel sums it.
        yield Launch(
            _causal_attention_bwd_delta_kernel, n_q_programs, out, dout, delta, **_strides(out=out, dout=dout),
            n_batch_heads=sizes["n_batch_heads"], n_heads=sizes["n_heads"], n_queries=sizes["n_queries"],
            keep_scale=scores["keep_scale"],
            HEAD_DIM=tile["HEAD_DIM"], PADDED_DIM=tile["PADDED_DIM"], BLOCK_Q=tile["BLOCK_Q"],
        )  # fmt: skip
    pointers = q, k, v, dout, stats[0], stats[1], delta, mask, seed
    arguments = {**_strides(q=q, k=k, v=v, dout=dout), **sizes, "scale": scale, **scores}
    arguments["N_PACKED"] = dq.stride(2) // (sizes["n_heads"] * dq.shape[3])
    yield Launch(_causal_attention_bwd_dq_kernel, n_q_programs, *pointers, dq, **arguments, **tile)
    yield Launch(_causal_attention_bwd_dkdv_kernel, n_k_programs, *pointers, dk, dv, **arguments, **k_tile)


# --- autograd -------------------------------------------------------------------------------------------------------


def _bwd_with_graph(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor,
    key_padding_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> list[Tensor | None]:  # fmt: skip
    """dq, dk and dv with their graph."""
    options: dict[str, Any] = {"scale": scale, "key_padding_mask": key_padding_mask}
    if seed is not None:
        options |= {"dropout_p": dropout_p, "seed": seed}
    with sdpa_kernel(SDPBackend.MATH):  # torch's only backend whose backward can be differentiated
        return formula_gradients(lambda q, k, v: formula(q, k, v, **options), (q, k, v), dout)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = causal_attention_fwd(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @twice_differentiable(lambda ctx, *grads: _gradients(ctx, grads[0], _bwd_with_graph))
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads[0], _bwd_in_one_tensor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, backward: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    return *backward(dout, *ctx.saved_tensors, ctx.scale, ctx.dropout_p), None, None, None, None


_causal_attention_op = torch.library.custom_op(
    "fastgpt_kernels::causal_attention", causal_attention_fwd, mutates_args=()
)
_causal_attention_backward_op = torch.library.custom_op(
    "fastgpt_kernels::causal_attention_backward", causal_attention_bwd, mutates_args=()
)


@_causal_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new_heads(q), _new_stats(q)


@_causal_attention_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads(q), _new_heads(k), _new_heads(v)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dout, _causal_attention_backward_op)


_causal_attention_op.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["causal_attention", "supports"]
