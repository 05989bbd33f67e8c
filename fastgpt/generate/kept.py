"""The workspaces that are kept for a model's next calls: of several sizes, within a limit, until its weights move."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from fastgpt_kernels.common.decode_weights import DecodeWeights
from transformers import GPT2LMHeadModel

from ..model.checks import check_module
from .copies import forget_copies
from .workspace import Workspace, fixed_in_graphs

Result = TypeVar("Result")

# By model, the one used last at the end. Held under the lock, because no two threads may take the same one.
_kept: WeakKeyDictionary[GPT2LMHeadModel, list[Workspace]] = WeakKeyDictionary()
_one_thread = RLock()


@contextmanager
def workspace(
    model: GPT2LMHeadModel, weights: DecodeWeights, n_rows: int, n_slots: int, n_new: int = 1
) -> Iterator[Workspace]:
    """A workspace that is kept for a model if one serves, else a new one; no other call can take it meanwhile.

    weights: the model's. The rest as for `Workspace`. It is kept again only if the block ends without an exception,
    because after one its state is unknown.
    """
    size = n_rows, n_slots, n_new
    taken = _take(model, weights, *size) or _allocate(model, weights, *size)
    taken.own_stream.make_caller_wait()
    taken.refresh(weights)
    try:
        yield taken
    finally:
        taken.own_stream.wait_for_caller()
    _keep(model, taken)


def workspaces(model: GPT2LMHeadModel) -> Sequence[Workspace]:
    """Those that are kept for a model, the one used last at the end."""
    return tuple(_kept.get(model, ()))


def release(model: torch.nn.Module) -> None:
    """Free what is kept for the next calls of a model: its caches, graphs and copies of weights.

    model: a GPT-2, or a module that contains one, such as an adapter; without effect if nothing is kept. The next call
    allocates everything again. A running call keeps its workspace until it ends. Moving a model by `to()` and similar
    methods releases it too. Raises TypeError when it is no torch module.
    """
    check_module(model, "release")
    with _one_thread:
        for module in model.modules():
            _kept.pop(module, None)  # type: ignore[arg-type]
            forget_copies(module)


def _take(model: GPT2LMHeadModel, weights: DecodeWeights, n_rows: int, n_slots: int, n_new: int) -> Workspace | None:
    with _one_thread:
        held = _kept.get(model)
        if not held:
            return None
        # The pointers in the graphs are no longer the model's where its weights have moved.
        fixed = fixed_in_graphs(weights)
        held[:] = [work for work in held if work.fixed == fixed]
        for work in reversed(held):
            if work.serves(n_rows, n_slots, n_new):
                held.remove(work)
                return work
        return None


def _allocate(model: GPT2LMHeadModel, weights: DecodeWeights, n_rows: int, n_slots: int, n_new: int) -> Workspace:
    """A new workspace. Where half the limit allows it, it has room for more, so that it serves longer calls too.

    That is the whole context or, if it is too long, a power of two of slots.
    """
    n_context = max(n_slots, model.config.n_positions)
    n_bytes_of_slot = 2 * n_rows * model.config.n_layer * model.config.n_embd * model.dtype.itemsize
    rounded = min(1 << (n_slots - 1).bit_length(), n_context)
    allowed = limit_bytes(model.device) // 2 // n_bytes_of_slot
    n_slots = next((n for n in (n_context, rounded) if n <= allowed), n_slots)
    return with_room(lambda: Workspace(model, weights, n_rows, n_slots, n_new))


def with_room(function: Callable[[], Result]) -> Result:
    """The result of a function that allocates. If memory runs out, all that is kept is freed, and it is called again.

    What is kept belongs to all models: what a call needs comes before what may be of use later.
    """
    try:
        return function()
    except torch.OutOfMemoryError:
        if not _kept:
            raise
    with _one_thread:
        _kept.clear()
    return function()


def _keep(model: GPT2LMHeadModel, work: Workspace) -> None:
    """Keep it for the next calls, and of those before it what the limit leaves room for."""
    limit = limit_bytes(model.device)
    with _one_thread:
        held: list[Any] = [*_kept.get(model, ()), work]
        while held and sum(one.n_bytes for one in held) > limit:
            del held[0]
        if held:
            _kept[model] = held
        else:
            _kept.pop(model, None)


def limit_bytes(device: torch.device) -> int:
    """The most that is kept for a model: an eighth of a GPU's memory, and 1 GiB at least."""
    n_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(2**30, n_bytes // 8)
