"""Range checks of ids and labels, where their values can be read."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .. import ops


def check_range(ids: Tensor, limit: int, message: str) -> None:
    """Raise ValueError on an id outside [0, limit). message: a template with {value} and {limit}."""
    # A captured or traced step cannot read values.
    if ids.numel() == 0 or ids.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if isinstance(ids, FakeTensor) or ops.is_transformed():
        return
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lowest, highest = torch.stack(torch.aminmax(ids)).tolist()  # on a GPU each read waits: read both at once
    if lowest < 0 or highest >= limit:
        raise ValueError(message.format(value=lowest if lowest < 0 else highest, limit=limit))


def check_labels(labels: Any, limit: int, ignore_index: int = -100) -> None:
    """Raise ValueError on a label outside [0, limit) that is not ignored, as the fused training loss does."""
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        message = "label {value} is outside the classes: it must be in [0, {limit}) or " + str(ignore_index)
        check_range(labels.where(labels != ignore_index, 0), limit, message)
