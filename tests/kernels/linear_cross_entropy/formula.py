"""linear_cross_entropy written out, and tensors to try it with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import fastgpt_kernels
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_parity, forward, gradients, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.operations.linear_cross_entropy import reference as loss_reference
from fastgpt_kernels.operations.linear_cross_entropy import tiles
from torch import Tensor

REDUCTIONS = ["mean", "sum", "none"]
# Both terms are large enough to show in every dtype.
TERMS = {"smoothing": {"label_smoothing": 0.1}, "z": {"z_loss": 0.05}, "both": {"label_smoothing": 1.0, "z_loss": 0.3}}
CHUNK_ROWS = 4


def loss_formula(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """A head that rounds its logits to the dtype, and a loss in float32, or float64 for float64 inputs."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    loss = F.cross_entropy(logits, labels, **options)
    if z_loss == 0:
        return loss
    squares = torch.where(labels == ignore_index, 0, logits.logsumexp(1).square())
    total = squares if reduction == "none" else squares.sum()
    return loss + z_loss * (total / (labels != ignore_index).sum() if reduction == "mean" else total)


def make_inputs(
    n_rows: int,
    n_channels: int,
    n_vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    ignored: float = 0.25,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(hidden, weight) and the labels; a share `ignored` of these is -100."""
    hidden, weight = 2 * random(n_rows, n_channels), random(n_vocabulary, n_channels, seed=1)
    generator = torch.Generator().manual_seed(n_rows)
    labels = torch.randint(n_vocabulary, (n_rows,), generator=generator, device="cpu")
    labels[torch.rand(n_rows, generator=generator, device="cpu") < ignored] = -100
    labels[: n_rows // 4 + 1 : 2] = n_vocabulary - 1
    tensors = relayout(hidden.to(dtype), layout), relayout(weight.to(dtype), layout)
    return tensors, labels.to(hidden.device)


def make_upstream(n_rows: int, layout: str = "contiguous") -> Tensor:
    """The gradient of every row's loss."""
    return relayout(random(n_rows, seed=5).float(), layout)


def of(operations: Any, labels: Tensor, **options: Any) -> Callable[..., Tensor]:
    """linear_cross_entropy as a function of hidden and weight."""
    # With partial, by which the table of accuracy finds the operation.
    return partial(operations.linear_cross_entropy, labels=labels, **options)


def assert_loss_parity(
    operations: Any,
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    upstream: Tensor | None = None,
    *,
    slack: float = 1.0,
    **options: Any,
) -> None:
    """The reference has more slack, because its logsumexp is rounded to an ulp of the largest logit."""
    slack = max(slack, 2) if operations is reference else slack
    grads = None if upstream is None else [upstream]
    assert_parity(
        of(operations, labels, **options), partial(loss_formula, labels=labels, **options), inputs, grads, slack=slack
    )


def results(operations: Any, inputs: tuple[Tensor, ...], labels: Tensor, **options: Any) -> list[Tensor]:
    """The loss and the gradients of hidden and weight."""
    loss = of(operations, labels, **options)
    (value,) = forward(loss, inputs)
    return [value, *gradients(loss, inputs, [random(*value.shape, seed=5)])]


def in_chunks(patch: pytest.MonkeyPatch, n_rows: int, n_vocabulary: int) -> None:
    """Reference and kernel compute the logits of so many rows at once."""
    patch.setattr(loss_reference, "_CHUNK_LOGITS", n_rows * n_vocabulary + n_vocabulary - 1)
    patch.setattr(tiles, "linear_cross_entropy_chunk_rows", lambda *_: n_rows)


def without_a_look_at_labels(patch: pytest.MonkeyPatch, operations: Any) -> Callable[..., Tensor]:
    """linear_cross_entropy as on a GPU, where a look at the labels would wait for it."""
    patch.setitem(operations.linear_cross_entropy.__globals__, "check_loss_arguments", lambda *_: None)
    return operations.linear_cross_entropy


def several_programs(patch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several tiles of a row."""
    patch.setattr(tiles, "linear_cross_entropy_chunk_rows", lambda *_: CHUNK_ROWS)
    if fastgpt_kernels.why_unavailable("linear_cross_entropy", torch.device("cpu")) is None:  # in the interpreter
        patch.setattr(tiles, "LINEAR_CROSS_ENTROPY_LANES", 8)
