"""Checks of what a user gives: a model, and the range of ids and labels where their values can be read."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import fastgpt.ops as ops

_PAST_THE_CONTEXT = "position {value} is outside the context: n_positions is {limit}"


def check_module(model: Any, function: str, *methods: str) -> None:
    """Raise TypeError unless the model given to a public function is a torch module that has these methods."""
    if isinstance(model, nn.Module) and all(hasattr(model, method) for method in methods):
        return
    wanted = "".join(f" with {method}()" for method in methods)
    given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    cure = ""
    if isinstance(getattr(model, "model", None), nn.Module):  # of a pipeline or a Trainer
        cure = ": give its .model"
    elif isinstance(model, str):
        cure = ": load it first, as by fastgpt.GPT2LMHeadModel.from_pretrained"
    raise TypeError(f"fastgpt.{function} takes a model{wanted}, not {given}{cure}")


def check_token_ids(ids: Tensor, n_vocab: int, may_wait: bool = False) -> None:
    """Raise ValueError on an id outside the vocabulary. The rest as in `check_range`."""
    message = "token id {value} is outside the vocabulary: it must be in [0, {limit})"
    check_range(ids, n_vocab, message, may_wait)


def check_positions(positions: Tensor, n_positions: int, may_wait: bool = False) -> None:
    """Raise ValueError on a position past the context. The rest as in `check_range`."""
    check_range(positions, n_positions, _PAST_THE_CONTEXT, may_wait)


def check_length(n_tokens: int, n_positions: int) -> None:
    """Raise ValueError when a sequence of n_tokens from position 0 does not fit into the context."""
    if n_tokens > n_positions:
        raise ValueError(_PAST_THE_CONTEXT.format(value=n_tokens - 1, limit=n_positions))


def context_is_full(n_positions: int) -> ValueError:
    """The error for a row that needs one more token than its context holds."""
    return ValueError(_PAST_THE_CONTEXT.format(value=n_positions, limit=n_positions))


def check_range(ids: Tensor, limit: int, message: str, may_wait: bool = False) -> None:
    """Raise ValueError on an id outside [0, limit).

    message: a template with {value} and {limit}. may_wait: read the values on a GPU too, which makes the host wait for
    everything that is queued there. Without it they are left to the assertions in torch's own kernels.
    """
    if ids.is_cuda and not may_wait:
        return
    if ids.numel() == 0 or not can_read(ids) or ops.is_transformed():
        return
    lowest, highest = torch.stack(torch.aminmax(ids)).tolist()  # on a GPU each read waits: read both at once
    if lowest < 0 or highest >= limit:
        raise ValueError(message.format(value=lowest if lowest < 0 else highest, limit=limit))


def can_read(x: Tensor) -> bool:
    """Whether the host can read values: not in a traced or captured step, nor of a tensor that has none of its own."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta or isinstance(x, FakeTensor):
        return False
    if is_traceable_wrapper_subclass(x):  # such as a DTensor
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_labels(labels: Any, limit: int, ignore_index: int = -100) -> None:
    """Raise ValueError on a label outside [0, limit) that is not ignored, as the fused training loss does."""
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        message = "label {value} is outside the classes: it must be in [0, {limit}) or " + str(ignore_index)
        check_range(labels.where(labels != ignore_index, 0), limit, message)
