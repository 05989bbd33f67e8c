"""The head and its cross-entropy in plain torch, without the logits of all rows at once."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

from ...common.second_order import formula_gradients, twice_differentiable

# Logits of one chunk of rows: large enough for an efficient matrix product, small compared with the weights.
_CHUNK_LOGITS = 2**25


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of softmax(hidden @ weight^T) against labels; the (N, V) logits never exist at once.

    hidden: (N, C). weight: (V, C). labels: (N,) int64 in [0, V) or ignore_index. reduction: mean (over the labels that
    are not ignored; NaN with gradients of zero when all are), sum, or none. label_smoothing: the share in [0, 1] of the
    target that is spread evenly over the vocabulary, as in torch's cross_entropy. z_loss: the weight of the square of
    log(sum(exp(logits))), which is added to the loss of a row. Logits are rounded to hidden's dtype, as by a separate
    head, and the loss is computed in float32 (float64 for float64 inputs).
    Returns a scalar, or (N,) with zeros at ignored labels for none.
    Raises ValueError when shapes or values do not fit or a label is out of range (on a GPU its loss and gradients are
    NaN instead).
    Sources: Cut Your Losses, arXiv 2411.09009; z_loss: PaLM, arXiv 2204.02311, section 5.
    """
    check_loss_arguments(hidden, weight, labels, reduction, ignore_index, label_smoothing, z_loss)
    options = ignore_index, label_smoothing, z_loss
    n_chunk_rows = max(1, _CHUNK_LOGITS // weight.shape[0])
    if reduction == "none":
        wide_weight = _widened(weight)  # Autograd sums the gradients of the chunks in this dtype.
        chunks = [
            checkpoint(row_losses, rows, wide_weight, row_labels, *options, use_reentrant=False)
            for rows, row_labels in zip(hidden.split(n_chunk_rows), labels.split(n_chunk_rows), strict=True)
        ]
        return torch.cat(chunks)
    total = _SummedLinearCrossEntropy.apply(hidden, weight, labels, options, n_chunk_rows)
    if reduction == "sum":
        return total
    n_counted = (labels != ignore_index).sum()
    # As in torch, a batch whose labels are all ignored has gradients of zero, so that it does not spoil the weights.
    return torch.where(n_counted > 0, total / n_counted.clamp(min=1), float("nan"))


def check_loss_arguments(
    hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, ignore_index: int, label_smoothing: float,
    z_loss: float,
) -> None:  # fmt: skip
    """Raise ValueError when the arguments of `linear_cross_entropy` do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be (N, C), weight (V, C) and labels (N,), "
            f"not {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"linear_cross_entropy: the vocabulary is empty: weight is {tuple(weight.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels must be int64, not {labels.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}: choose one of mean, sum, none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be in [0, 1], not {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"linear_cross_entropy: z_loss must be finite and 0 or more, not {z_loss}")
    is_real = not torch.compiler.is_compiling() and not isinstance(labels, FakeTensor)
    if labels.device.type == "cpu" and is_real:
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if wrong.numel():
            raise ValueError(f"label {int(wrong[0])} is outside the vocabulary: it must be in [0, {weight.shape[0]})")


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def row_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """(N,) losses of one chunk, differentiable by autograd."""
    logits = _widened(hidden @ weight.to(hidden.dtype).t())
    counts = labels != ignore_index
    # So that NaN in an ignored row reaches no gradient of a row.
    logits = logits.masked_fill(~counts[:, None], 0.0)
    safe_labels, factor = _checked_labels(labels, logits.shape[1], ignore_index)
    losses = F.cross_entropy(logits, safe_labels, reduction="none", label_smoothing=label_smoothing)
    if z_loss > 0:
        losses = losses + z_loss * logits.logsumexp(1).square()
    return torch.where(counts, losses * factor, 0.0)


def _checked_labels(labels: Tensor, n_vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels in range, 0 in place of others, and (N,) factors: NaN where a label that counts was out of range, else 1.

    A loss times its factor has gradients of NaN too.
    """
    in_range = (labels >= 0) & (labels < n_vocabulary)
    # In float32, because a choice of two numbers has torch's default dtype.
    ones = torch.ones_like(labels, dtype=torch.float32)
    factor = ones.masked_fill(~(in_range | (labels == ignore_index)), float("nan"))
    return torch.where(in_range, labels, 0), factor


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """The summed loss. Forward also computes its gradients, because the backward of a scalar only scales them."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, options: tuple[int, float, float], n_chunk_rows: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = _widened(hidden.new_zeros(()))
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=total.dtype) if wants_weight else None
        for start in range(0, hidden.shape[0], n_chunk_rows):
            rows = slice(start, start + n_chunk_rows)
            logits = hidden[rows] @ weight.t()
            dlogits, losses = _softmax_minus_target(_widened(logits), labels[rows], *options)
            total = total + losses.sum()
            dlogits = dlogits.to(logits.dtype)
            if dhidden is not None:
                dhidden[rows] = (dlogits @ weight).to(dhidden.dtype)
            if dweight is not None and dweight.dtype == dlogits.dtype == hidden.dtype:
                dweight.addmm_(dlogits.t(), hidden[rows])
            elif dweight is not None:
                dweight += dlogits.t() @ hidden[rows]
        ctx.save_for_backward(hidden, weight, labels, dhidden, dweight)
        ctx.options = options
        return total

    @staticmethod
    @twice_differentiable(lambda ctx, dtotal: _summed_with_graph(ctx, dtotal))
    def backward(ctx, *grads: Tensor):
        (dtotal,) = grads
        _, weight, _, dhidden, dweight = ctx.saved_tensors
        return (
            # Not multiplied in half precision, where dtotal could overflow under loss scaling or lose digits.
            None if dhidden is None else (_widened(dhidden) * dtotal).to(dhidden.dtype),
            None if dweight is None else (dweight * dtotal).to(weight.dtype),
            None,
            None,
            None,
        )


def _summed_with_graph(ctx, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients with their graph. The logits are recomputed, all rows at once."""
    hidden, weight, labels = ctx.saved_tensors[:3]
    formula = lambda hidden, weight: row_losses(hidden, weight, labels, *ctx.options)  # noqa: E731
    return *formula_gradients(formula, (hidden, weight), dtotal.expand(len(labels))), None, None, None


def _softmax_minus_target(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """dloss/dlogits (N, V) and the losses (N,); ignored rows are zero, rows with a label out of range NaN."""
    counts = labels != ignore_index
    safe_labels, factor = _checked_labels(labels, logits.shape[1], ignore_index)
    safe_labels, log_probabilities = safe_labels[:, None], logits.log_softmax(1)
    of_labels = log_probabilities.gather(1, safe_labels)
    log_sum_exp, losses = logits.gather(1, safe_labels) - of_labels, -of_labels
    if label_smoothing > 0:
        losses = losses + label_smoothing * (of_labels - log_probabilities.mean(1, keepdim=True))
    if z_loss > 0:
        losses = losses + z_loss * log_sum_exp.square()
    losses = losses.squeeze(1) * factor
    dlogits = log_probabilities.exp_()  # the probabilities
    label_probabilities, z_factor = dlogits.gather(1, safe_labels), 2 * z_loss * log_sum_exp
    if z_loss > 0:
        dlogits *= 1 + z_factor
    # The target is subtracted before anything is added, because the difference may be much smaller than its terms.
    dlogits.scatter_(1, safe_labels, label_probabilities - (1 - label_smoothing) + label_probabilities * z_factor)
    if label_smoothing > 0:
        dlogits -= label_smoothing / logits.shape[1]
    dlogits.masked_fill_(~counts[:, None], 0.0).masked_fill_(factor.isnan()[:, None], float("nan"))
    return dlogits, torch.where(counts, losses, 0.0)
