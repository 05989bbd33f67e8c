"""The training loss of a language model, from its logits or, fused with the head, without them.

Shapes: B batch, T tokens, C channels, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

import fastgpt.ops as ops

from ..messages import shown


@dataclass(frozen=True)
class CausalLMLoss:
    """transformers' loss with more terms; a fastgpt model in training computes it without the logits.

    `model.loss_function = CausalLMLoss(label_smoothing=0.1)` sets it, on a model of fastgpt or of transformers.
    label_smoothing: Trainer's label_smoothing_factor. z_loss: Liger's lse_square_scale. Both as in
    `fastgpt_kernels.linear_cross_entropy`. reduction: "mean" over the labels that count, or "none", which gives losses
    (B, T), each at the position that predicts: zero at the last one and where the label is ignored.
    Raises ValueError on values that cannot be.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        if not (isinstance(self.label_smoothing, Real) and 0 <= self.label_smoothing <= 1):
            raise ValueError(f"label_smoothing must be in [0, 1], not {shown(self.label_smoothing)}")
        if not (isinstance(self.z_loss, Real) and 0 <= self.z_loss < math.inf):
            raise ValueError(f"z_loss must be finite and 0 or more, not {shown(self.z_loss)}")
        if self.reduction not in ("mean", "none"):
            raise ValueError(f"unknown reduction {shown(self.reduction)}: choose one of mean, none")

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """From logits (B, T, V), with transformers' arguments."""
        shift_labels = shifted(labels, ignore_index) if shift_labels is None else shift_labels
        targets = shift_labels.flatten().to(logits.device)
        logits = logits.view(-1, vocab_size)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": self.label_smoothing}
        losses = F.cross_entropy(logits, targets, reduction="none", **options)
        counts = targets != ignore_index
        if self.z_loss > 0:
            losses = losses + self.z_loss * torch.where(counts, logits.logsumexp(1).square(), 0.0)
        if self.reduction == "none":
            return losses.view(shift_labels.shape)
        return losses.sum() / _on(losses, counts.sum() if num_items_in_batch is None else num_items_in_batch)

    def fused(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        shift_labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Tensor:
        """From hidden_states (B, T, C), the weight (V, C) of the head and the labels (B, T) of `shifted`."""
        is_sum = self.reduction == "mean" and num_items_in_batch is not None
        loss = ops.linear_cross_entropy(
            hidden_states.flatten(0, -2),
            weight,
            shift_labels.flatten().to(hidden_states.device),
            reduction="sum" if is_sum else self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        if self.reduction == "none":
            return loss.view(shift_labels.shape)
        return loss if num_items_in_batch is None else loss / _on(loss, num_items_in_batch)


def fusable(loss_function: Callable) -> CausalLMLoss | None:
    """The loss that can be fused with the head and gives what `loss_function` gives; None if there is none."""
    if loss_function is ForCausalLMLoss:
        return CausalLMLoss()
    return loss_function if isinstance(loss_function, CausalLMLoss) else None


def shifted(labels: Tensor | None, ignore_index: int = -100) -> Tensor:
    """labels (B, T), each at the position that predicts it; the last position predicts nothing."""
    assert labels is not None
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _on(loss: Tensor, n_items: Tensor | int) -> Tensor | int:
    return n_items.to(loss.device) if isinstance(n_items, Tensor) else n_items
