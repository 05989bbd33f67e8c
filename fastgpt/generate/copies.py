"""Copies of a model's matrices that products on a CPU read, kept for the model's next calls.

A copy counts only while its matrix is, bit for bit, what it was when it was copied. A tensor's version does not tell
that: fused optimisers and edits through `.data` leave it as it is. So the matrix as it was is kept beside the copy, and
every call compares the two, which takes a third of the time of another copy or less.
"""

import ctypes
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from fastgpt_kernels.common.decode_weights import Matrix, RoundedMatrix
from torch import Tensor, nn

from ..container import available_memory, total_memory
from .implementations import Prepared


class _Copy(NamedTuple):
    """prepared: a matrix, ready for one implementation. original: the tensors of the matrix, as they were then."""

    prepared: Prepared
    original: list[Tensor]

    @property
    def n_bytes(self) -> int:
        return self.prepared.n_bytes + sum(part.nbytes for part in self.original)


# By model: what its last call with copies made or found. The key says where the matrix lies, and what was made of it.
_kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Copy]] = WeakKeyDictionary()


class Copies:
    """What one call of a model finds of the call before and leaves to the next. model: None keeps nothing."""

    def __init__(self, model: nn.Module | None = None):
        self._model = model
        self._found = {} if model is None else _kept.get(model, {})
        self._left: dict[Hashable, _Copy] = {}
        self._has_made = False  # a copy since the gaps were closed

    @functools.cached_property
    def _room(self) -> int:
        """Bytes that may be left to the next call. Not of what is free now, because the choice of what is copied
        depends on it, and the same call has the same bits each time."""
        return 0 if self._model is None else limit_bytes()

    @functools.cached_property
    def _free(self) -> int:
        """Bytes that may be taken for matrices as they are. A copy without one is not left to the next call."""
        return available_memory() // 4

    def have_room_for(self, n_bytes: int) -> bool:
        """Whether copies, with the matrices as they were, may be left to the next call."""
        return n_bytes <= self._room

    def prepared(self, matrix: Matrix, how: Hashable, implementation: Callable[[Matrix], Prepared]) -> Prepared:
        """What an implementation makes of a matrix, or made of it in the call before. how: all that it depends on."""
        parts = list(matrix) if isinstance(matrix, RoundedMatrix) else [matrix]
        key = *(part.data_ptr() for part in parts), how
        copy = self._found.get(key)
        if copy is None or not all(map(_same_bits, parts, copy.original)):
            self._found.pop(key, None)
            del copy  # before another takes its memory
            prepared = implementation(matrix)
            self._has_made |= prepared.n_bytes > 0
            n_bytes = sum(part.nbytes for part in parts)
            if not 0 < prepared.n_bytes <= self._room or n_bytes > self._free:
                return prepared
            self._free -= n_bytes
            copy = _Copy(prepared, [part.detach().clone() for part in parts])
        if copy.n_bytes <= self._room:
            self._room -= copy.n_bytes
            self._left[key] = copy
        return copy.prepared

    def close_gaps(self) -> None:
        """Give back to the system what making copies has freed.

        glibc keeps it for the next allocation. But between copies of many matrices it finds no use for the gaps that
        the temporaries of making them leave, which are as large as the copies or larger.
        """
        trim = _malloc_trim()
        if self._has_made and trim is not None:
            trim(0)
        self._has_made = False

    def keep(self) -> None:
        """Keep this call's copies for the next one, in place of earlier ones; if it has none, those stay."""
        if self._model is not None and self._left:
            _kept[self._model] = self._left


def forget_copies(model: nn.Module) -> None:
    """Free the copies that are kept for a model."""
    _kept.pop(model, None)


def limit_bytes() -> int:
    """The most that is kept for a model: an eighth of the memory."""
    return total_memory() // 8


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors hold the same bits in the same order: NaN is equal to itself here, and 0 is not equal to -0."""
    if (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype):
        return False
    pair = [x.detach() if x.is_contiguous() else x.detach().t() for x in (one, other)]
    if all(x.is_contiguous() and x.nbytes % 8 == 0 == x.data_ptr() % 8 for x in pair):
        pair = [x.view(-1).view(torch.int64) for x in pair]  # three times as fast as bytes
    else:
        pair = [x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]) for x in pair]
    return torch.equal(*pair)
