"""Every operation in plain torch: the specification, the parity reference and the path for CPUs.

Right in every floating dtype up to float64, differentiable in every floating input, on any device.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .second_order import formula_gradients, twice_differentiable

# The tanh form is what GPT-2 was trained with; gelu_fast is the same function with a rounded constant.
_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}

# --- layer norm -----------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of x to mean 0 and variance 1, then scale and shift it.

    x: (..., C). weight, bias: (C,). eps: added to the variance.
    Returns (..., C) in x's dtype. Raises ValueError when weight or bias is not (C,).
    Source: Layer Normalization, arXiv 1607.06450.
    """
    n_channels = x.shape[-1]
    if weight.shape != (n_channels,) or bias.shape != (n_channels,):
        raise ValueError(
            f"layer_norm: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be ({n_channels},), "
            f"the last axis of x {tuple(x.shape)}"
        )
    if x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu" and torch.is_grad_enabled():
        # torch sums the gradients of weight and bias in x's dtype here: of 8192 rows, bfloat16 loses most.
        return F.layer_norm(x.float(), (n_channels,), weight.float(), bias.float(), eps).to(x.dtype)
    return F.layer_norm(x, (n_channels,), weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum.

    x, residual: (..., C). weight, bias: (C,). eps: added to the variance.
    Returns (layer_norm(x + residual), x + residual), both (..., C).
    Raises ValueError when the shapes differ. Source: `layer_norm`.
    """
    if x.shape != residual.shape:
        raise ValueError(f"add_layer_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} differ in shape")
    summed = x + residual
    return layer_norm(summed, weight, bias, eps), summed


# --- attention ------------------------------------------------------------------------------------------------------


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

    q: (B, H, Tq, D). k, v: (B, H, Tk, D) with Tk >= Tq: the queries sit at the end of the keys, so that query i sees
    keys 0 .. Tk - Tq + i. scale: D**-0.5 when None. key_padding_mask: (B, Tk) bool, True = attend.
    dropout_p: share of the attention weights that are zeroed, in steps of 1/65536. seed: 64-bit integer, or a tensor
    holding one, that fixes which (see `dropout_keep_mask`); drawn from torch's generator when None.
    Returns (B, H, Tq, D). A query that sees no key gives zeros.
    Raises ValueError when shapes do not fit or dropout_p is outside [0, 1).
    Source: FlashAttention-2, arXiv 2307.08691.
    """
    check_attention_arguments(q, k, v, key_padding_mask, dropout_p)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if q.numel() == 0:
        return q.clone()
    scale = math.pow(q.shape[-1], -0.5) if scale is None else scale

    if dropout_p == 0.0 and key_padding_mask is None:
        if n_queries == 1:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        # Where is_causal hides scores as -inf and scales them after, a scale of 0 gives NaN and one below it +inf.
        if n_queries == n_keys and scale > 0:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True)

    visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]  # (B, 1, Tq, Tk)
        # Values at masked keys may be NaN or Inf, which a weight of zero would not silence.
        v = v.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        k = k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
    if dropout_p == 0.0:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        return attended if key_padding_mask is None else attended.masked_fill(~visible.any(-1, keepdim=True), 0.0)

    scores = (q @ k.transpose(-1, -2)) * scale
    # A finite floor, so that a row that sees nothing has finite weights, which are then zeroed, and finite gradients.
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~visible, 0.0)
    keep, keep_scale = dropout_keep_mask((q.shape[0], q.shape[1], n_queries, n_keys), dropout_p, seed, q.device)
    return (weights * keep * keep_scale).to(v.dtype) @ v


def check_attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, dropout_p: float
) -> None:
    """Raise ValueError, naming the shapes, when the arguments of `causal_attention` do not fit together."""
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "causal_attention: q must be (B, H, Tq, D) and k, v (B, H, Tk, D), "
            f"not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"causal_attention: {q.shape[2]} queries cannot sit at the end of {k.shape[2]} keys")
    if key_padding_mask is not None:
        expected = (k.shape[0], k.shape[2])
        if key_padding_mask.shape != expected or key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"causal_attention: key_padding_mask must be bool of shape {expected}, "
                f"not {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"causal_attention: dropout_p must be in [0, 1), not {dropout_p}")


# --- dropout --------------------------------------------------------------------------------------------------------

PHILOX_ROUNDS = 7
_UINT32 = 0xFFFFFFFF


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox 4x32: four 32-bit words from a counter of four and a 64-bit key, all held in int64 tensors.

    Source: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011).
    """
    c0, c1, c2, c3 = counter
    key_low, key_high = seed & _UINT32, (seed >> 32) & _UINT32
    for _ in range(PHILOX_ROUNDS):
        # A 64-bit product may overflow into the sign; masking after the shift restores its upper word.
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product_2 >> 32) & _UINT32) ^ c1 ^ key_low, ((product_0 >> 32) & _UINT32) ^ c3 ^ key_high
        c1, c3 = product_2 & _UINT32, product_0 & _UINT32
        key_low, key_high = (key_low + 0x9E3779B9) & _UINT32, (key_high + 0xBB67AE85) & _UINT32
    return [c0, c1, c2, c3]


def dropout_keep_mask(
    shape: tuple[int, int, int, int], dropout_p: float, seed: int | Tensor | None, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """Which attention weights survive dropout, a function of the seed and the position alone.

    shape: (B, H, Tq, Tk). One Philox call draws 16 bits for each of eight elements: those whose positions differ in
    bits 0 and 3 of the key and bit 3 of the query, which one thread of a tensor-core accumulator holds.
    Returns the (B, H, Tq, Tk) bool mask and the factor that keeps the expectation.
    """
    n_batch, n_heads, n_queries, n_keys = shape
    seed = seed_tensor(seed, device)
    # key = 16 * k_tile + 8 * k_word + 2 * k_pair + half,  query = 16 * q_tile + 8 * q_word + q_row
    n_q_tiles, n_k_tiles = -(-n_queries // 16), -(-n_keys // 16)
    batch_head = torch.arange(n_batch * n_heads, device=device).view(-1, 1, 1)
    q_group = torch.arange(n_q_tiles * 8, device=device).view(1, -1, 1)
    k_group = torch.arange(n_k_tiles * 4, device=device).view(1, 1, -1)
    words = philox([k_group, q_group, batch_head, torch.zeros_like(k_group)], seed)
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)])
    draws = draws.view(2, 2, 2, n_batch, n_heads, n_q_tiles, 8, n_k_tiles, 4)  # q_word, k_word, half, ...
    draws = draws.permute(3, 4, 5, 0, 6, 7, 1, 8, 2).reshape(n_batch, n_heads, n_q_tiles * 16, n_k_tiles * 16)
    threshold = dropout_threshold(dropout_p)
    return draws[:, :, :n_queries, :n_keys] >= threshold, 65536 / (65536 - threshold)


def seed_tensor(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """The 64 bits of a dropout seed as a 0-d int64 tensor; drawn from torch's generator when seed is None.

    seed: an integer in [-2**63, 2**64), or a tensor that holds one. Raises ValueError on anything else.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.is_floating_point():
            raise ValueError(f"dropout seed must hold one integer, not {tuple(seed.shape)} of {seed.dtype}")
        return seed.to(device, torch.int64).reshape(())
    if not -(2**63) <= seed < 2**64 or int(seed) != seed:
        raise ValueError(f"dropout seed must be an integer of 64 bits, not {seed}")
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def dropout_threshold(dropout_p: float) -> int:
    """The share in units of 1/65536; never all of it, so that the surviving weights have a finite factor."""
    return min(round(dropout_p * 65536), 65535)


# --- MLP ------------------------------------------------------------------------------------------------------------


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    activation: str = "gelu_new",
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """residual + dropout(activation(x @ fc_weight + fc_bias) @ proj_weight + proj_bias).

    x: (..., C). fc_weight: (C, F), fc_bias: (F,), proj_weight: (F, C), proj_bias: (C,): (in, out), as Conv1D stores
    them. activation: a key of `ACTIVATIONS`. residual: of the result's shape, nothing when None.
    dropout_p: share of the elements that are zeroed, in steps of 1/65536. seed: 64-bit integer, or a tensor holding
    one, that fixes which (`dropout_keep_mask` of (1, 1, N, C)); drawn from torch's generator when None.
    Returns (..., C), in the dtype to which residual and the product promote.
    Raises ValueError on an unknown activation, when the shapes do not fit and when dropout_p is outside [0, 1).
    Source: Language Models are Unsupervised Multitask Learners; GELU, arXiv 1606.08415.
    """
    check_mlp_arguments(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, residual, dropout_p)
    rows = x.reshape(-1, x.shape[-1])
    hidden = ACTIVATIONS[activation](torch.addmm(fc_bias, rows, fc_weight))  # (N, F)
    out = torch.addmm(proj_bias, hidden, proj_weight)  # (N, C)
    if dropout_p > 0.0:
        keep, keep_scale = dropout_keep_mask((1, 1, out.shape[0], out.shape[1]), dropout_p, seed, out.device)
        out = out * keep[0, 0] * keep_scale
    out = out.view(*x.shape[:-1], proj_weight.shape[1])
    return out if residual is None else residual + out


def check_mlp_arguments(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    activation: str,
    residual: Tensor | None,
    dropout_p: float,
) -> None:
    """Raise ValueError, naming what does not fit, on arguments that `gelu_mlp` cannot take."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"gelu_mlp: unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    n_hidden, n_out = proj_weight.shape[0], proj_weight.shape[-1]
    if (fc_weight.shape, fc_bias.shape) != ((x.shape[-1], n_hidden), (n_hidden,)) or proj_bias.shape != (n_out,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, fc_weight, fc_bias, proj_weight, proj_bias))
        raise ValueError(f"gelu_mlp: x must be (..., C), the rest (C, F), (F,), (F, C) and (C,), not {shapes}")
    if residual is not None and residual.shape != (*x.shape[:-1], n_out):
        expected = *x.shape[:-1], n_out
        raise ValueError(f"gelu_mlp: residual must be {expected}, not {tuple(residual.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"gelu_mlp: dropout_p must be in [0, 1), not {dropout_p}")


# --- linear + cross-entropy -----------------------------------------------------------------------------------------

# Logits of one chunk of rows: large enough for a good matrix product, small beside the weights.
_CHUNK_LOGITS = 2**25


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight^T) against labels; the (N, V) logits never exist at once.

    hidden: (N, C). weight: (V, C). labels: (N,) int64 in [0, V) or ignore_index. reduction: mean (over the labels that
    count; NaN, with gradients of zero, when none does), sum, or none. Logits are rounded to hidden's dtype, as a
    separate head would leave them, and the loss is computed in float32 (float64 for float64 inputs).
    Returns a scalar, or (N,) with zeros at ignored labels for none.
    Raises ValueError when shapes do not fit or a label is out of range (off the CPU, its loss is NaN instead).
    Source: Cut Your Losses, arXiv 2411.09009.
    """
    check_loss_arguments(hidden, weight, labels, reduction, ignore_index)
    n_chunk_rows = max(1, _CHUNK_LOGITS // max(1, weight.shape[0]))
    if reduction == "none":
        wide_weight = _accumulator(weight)  # in which autograd sums the gradients of the chunks
        chunks = [
            checkpoint(row_losses, rows, wide_weight, row_labels, ignore_index, use_reentrant=False)
            for rows, row_labels in zip(hidden.split(n_chunk_rows), labels.split(n_chunk_rows), strict=True)
        ]
        return torch.cat(chunks)
    total = _SummedLinearCrossEntropy.apply(hidden, weight, labels, ignore_index, n_chunk_rows)
    if reduction == "sum":
        return total
    n_counted = (labels != ignore_index).sum()
    # As in torch, a batch in which no label counts has gradients of zero, so that it does not spoil the weights.
    return torch.where(n_counted > 0, total / n_counted.clamp(min=1), float("nan"))


def check_loss_arguments(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, ignore_index: int) -> None:
    """Raise ValueError when the arguments of `linear_cross_entropy` do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be (N, C), weight (V, C) and labels (N,), "
            f"not {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels must be int64, not {labels.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}: choose one of mean, sum, none")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if wrong.numel():
            raise ValueError(f"label {int(wrong[0])} is outside the vocabulary: it must be in [0, {weight.shape[0]})")


def _accumulator(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def row_losses(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(N,) losses of one chunk, differentiable by autograd."""
    logits = _accumulator(hidden @ weight.to(hidden.dtype).t())
    counts, in_range = labels != ignore_index, (labels >= 0) & (labels < weight.shape[0])
    picked = logits.gather(1, torch.where(in_range, labels, 0)[:, None]).squeeze(1)
    losses = torch.where(in_range, logits.logsumexp(1) - picked, float("nan"))
    return torch.where(counts, losses, 0.0)


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """The summed loss, its gradients computed in the same pass: a scalar's backward only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, n_chunk_rows: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = _accumulator(hidden.new_zeros(()))
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=total.dtype) if wants_weight else None
        for start in range(0, hidden.shape[0], n_chunk_rows):
            rows = slice(start, start + n_chunk_rows)
            logits = hidden[rows] @ weight.t()
            dlogits, losses = _softmax_minus_one_hot(_accumulator(logits), labels[rows], ignore_index)
            total = total + losses.sum()
            dlogits = dlogits.to(logits.dtype)
            if dhidden is not None:
                dhidden[rows] = (dlogits @ weight).to(dhidden.dtype)
            if dweight is not None and dweight.dtype == dlogits.dtype == hidden.dtype:
                dweight.addmm_(dlogits.t(), hidden[rows])
            elif dweight is not None:
                dweight += dlogits.t() @ hidden[rows]
        ctx.save_for_backward(hidden, weight, labels, dhidden, dweight)
        ctx.ignore_index = ignore_index
        return total

    @staticmethod
    @twice_differentiable(lambda ctx, dtotal: _summed_with_graph(ctx, dtotal))
    def backward(ctx, *grads: Tensor):
        (dtotal,) = grads
        _, weight, _, dhidden, dweight = ctx.saved_tensors
        return (
            # dtotal in half precision would overflow under loss scaling and shift every gradient alike.
            None if dhidden is None else (_accumulator(dhidden) * dtotal).to(dhidden.dtype),
            None if dweight is None else (dweight * dtotal).to(weight.dtype),
            None,
            None,
            None,
        )


def _summed_with_graph(ctx, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients with their graph, from logits that are computed again, all at once."""
    hidden, weight, labels = ctx.saved_tensors[:3]
    formula = partial(row_losses, labels=labels, ignore_index=ctx.ignore_index)
    return *formula_gradients(formula, (hidden, weight), dtotal.expand(len(labels))), None, None, None


def _softmax_minus_one_hot(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """dloss/dlogits (N, V) and the losses (N,); rows that do not count are zero, rows with a wrong label NaN."""
    counts, in_range = labels != ignore_index, (labels >= 0) & (labels < logits.shape[1])
    safe_labels = torch.where(in_range, labels, 0)[:, None]
    log_sum_exp = logits.logsumexp(1, keepdim=True)
    losses = (log_sum_exp - logits.gather(1, safe_labels)).squeeze(1)
    losses = torch.where(counts, torch.where(in_range, losses, float("nan")), 0.0)
    dlogits = (logits - log_sum_exp).exp_()
    dlogits.scatter_add_(1, safe_labels, torch.full_like(dlogits[:, :1], -1.0))
    dlogits.masked_fill_(~counts[:, None], 0.0).masked_fill_((counts & ~in_range)[:, None], float("nan"))
    return dlogits, losses
