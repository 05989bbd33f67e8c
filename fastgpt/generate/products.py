"""The products of a decode step on a CPU: few rows by a model's matrices, each by the fastest implementation here.

Which of the `implementations` is faster depends on the processor, its free cores, the rows, the shape and the dtype, so
it is timed: once a process for each of these, at the first generation that is long enough to gain from it.

r rows, K inputs, N outputs.
"""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch
from fastgpt_kernels.common.decode_weights import DecodeWeights, Matrix, RoundedMatrix
from fastgpt_kernels.common.int4 import Int4Matrix
from fastgpt_kernels.operations.decode_step.reference import head_matrix, multiply
from torch import Tensor

from ..container import available_memory
from ..model import digits
from .copies import Copies
from .implementations import Prepared, Rows, columns, exactness, implementations_of

# --- half precision -------------------------------------------------------------------------------------------------


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies a half-precision dtype far slower than float32, because it lacks the instructions.

    Timed once a process, in a few milliseconds. Without the instructions the factor is about 50, with them at most 2
    besides what a call takes. Another process that takes the core can make any product slow, but not five in a row.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    return all(_slowness(dtype) > 8 for _ in range(5))


def _slowness(dtype: torch.dtype) -> float:
    """How many times as long as float32 a small product takes."""
    seconds = {}
    for kind in (dtype, torch.float32):
        x, times = torch.ones(16, 256, dtype=kind, device="cpu"), []
        matrix = x.new_ones(256, 256)
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(x, matrix)
            times.append(time.perf_counter() - start)
        seconds[kind] = min(times)
    return seconds[dtype] / seconds[torch.float32]


def has_memory_for(n_bytes: int) -> bool:
    """Whether copies of weights of this size leave at least half of the free memory."""
    return n_bytes <= available_memory() // 2


# --- the choice -----------------------------------------------------------------------------------------------------

# Timing the implementations takes as long as two to four steps, and fewer steps than these may not earn it back.
MIN_STEPS = 16
# Another than the first must gain this much over it, because a gain within the noise would change bits for nothing.
_MIN_GAIN = 1.1
_TURNS = 5
# An implementation whose first product took this many times as long as the quickest is not timed further.
_HOPELESS = 8
# The head is timed in parts of this share, one after another: each has left the caches when it is read again, as in a
# step.
_PARTS_OF_HEAD = 8
# A copy that is kept is made once. Every later call compares its matrix, in about this share of the time that making
# the copy took, and only this share counts when an implementation is chosen, from the first call on.
_SHARE_OF_KEPT = 0.25


class Cost(NamedTuple):
    """What one implementation takes for one matrix, in seconds. copies: whether it holds a copy of the matrix."""

    prepare: float
    multiply: float
    copies: bool

    def of(self, n_steps: int) -> float:
        return self.prepare + n_steps * self.multiply

    def if_kept(self) -> "Cost":
        """That of a later call, which finds the copy."""
        return self._replace(prepare=_SHARE_OF_KEPT * self.prepare) if self.copies else self


_measured: dict[tuple, dict[str, Cost]] = {}


def costs(matrices: Sequence[Matrix], n_rows: int, rows: Rows | None = None) -> dict[str, Cost]:
    """The cost of each implementation, by its name, measured when a process first asks for matrices of this kind."""
    matrix = matrices[0]
    if isinstance(matrix, RoundedMatrix):
        how: tuple = matrix.kind, rows, isinstance(matrix, Int4Matrix) and matrix.group_size
    else:
        how = matrix.stride(), matrix.dtype
    kind = n_rows, matrix.shape, how, torch.get_num_threads()
    if kind not in _measured:
        _measured[kind] = _measure(matrices, n_rows, rows)
    return _measured[kind]


def _measure(matrices: Sequence[Matrix], n_rows: int, rows: Rows | None) -> dict[str, Cost]:
    first, samples = matrices[0], list(matrices)
    if len(matrices) == 1 and (isinstance(first, RoundedMatrix) or not first.is_contiguous()):
        # The head, which is large and the only one.
        part = -(-first.shape[1] // _PARTS_OF_HEAD)
        samples = [columns(first, slice(start, start + part)) for start in range(0, first.shape[1] - part + 1, part)]
    n_inputs, n_outputs = samples[0].shape
    if isinstance(first, Tensor):
        rows = Rows(first.dtype, first.dtype)
    assert rows is not None  # `implementations_of` needs it for a rounded matrix
    x = torch.empty(n_rows, n_inputs, dtype=rows.dtype, device="cpu")
    x.normal_(generator=torch.Generator("cpu").manual_seed(0))
    bias = x.new_zeros(n_outputs)
    if rows.precision == torch.int8:
        is_exact = exactness(samples[0], digits.rounded(x), rows.dtype)
    else:
        is_exact = exactness(samples[0], x.to(rows.precision), rows.precision)
    prepared: dict[str, list[Prepared]] = {}
    prepare_s, multiply_s = {}, {}
    for name, implementation in implementations_of(samples[0], n_rows, rows).items():
        start = time.perf_counter()
        products = [implementation(sample) for sample in (samples[0], samples[-1])]
        prepare_s[name], multiply_s[name] = (time.perf_counter() - start) / 2, []
        if is_exact(products[0](x, bias)):
            if not products[0].n_bytes:
                products += map(implementation, samples[1:-1])
            prepared[name] = products
    index = itertools.count()
    for turn in range(_TURNS):
        quickest = min((seconds for timed in multiply_s.values() for seconds in timed), default=float("inf"))
        for name, products in prepared.items():
            if turn and min(multiply_s[name]) > _HOPELESS * quickest:
                continue
            # As in a step, the processor has the implementation's code in its near caches, and of the matrix nothing:
            # the implementation before, which may have read the same memory, multiplied another one.
            products[next(index) % len(products)](x, bias)
            start = time.perf_counter()
            products[next(index) % len(products)](x, bias)
            multiply_s[name].append(time.perf_counter() - start)
    return {
        name: Cost(prepare_s[name], median(multiply_s[name]), products[0].n_bytes > 0)
        for name, products in prepared.items()
    }


def fastest(known: dict[str, Cost], n_steps: int) -> str:
    """The implementation that costs least over n_steps steps, or the first, untimed one where the gain is small."""
    first = next(iter(known))
    best = min(known, key=lambda name: known[name].of(n_steps))
    # Where the first converts int8 to floats, so do others, and that says nothing about the gain.
    shared = known[first].prepare
    gains = known[first].of(n_steps) - shared > _MIN_GAIN * (known[best].of(n_steps) - shared)
    return best if gains else first


class Products:
    """The products of one call of `generate()`: call it as `torch.addmm` of a matrix of the model.

    n_rows: rows of a step. n_steps: the most steps of the call. precision: the dtype of the user's model, or int8 if
    the rows that int8 weights multiply may be rounded to it. Where the weights are on a CPU and the steps many, an
    implementation is chosen for each matrix: `chosen` names it by the shape (K, N). It may hold copies of the matrices,
    n_bytes in all, as long as this object lives. copies: those of the model's call before, and for its next one.
    """

    def __init__(
        self,
        weights: DecodeWeights,
        n_rows: int,
        n_steps: int,
        precision: torch.dtype | None = None,
        copies: Copies | None = None,
    ):
        self.chosen: dict[tuple[int, int], str] = {}
        self.n_bytes = 0
        self._prepared: dict[int, Prepared] = {}
        if weights.wte.device.type != "cpu":
            return
        dtype = weights.wte.dtype
        if precision is None or (precision == torch.int8 and not digits.is_exact(digits.Stored)):
            precision = dtype
        rows, copies = Rows(dtype, precision), copies or Copies()
        for matrices in _by_kind(weights):
            name = _choose(matrices, n_rows, n_steps, rows, copies)
            if name is None:
                continue
            n_inputs, n_outputs = matrices[0].shape
            self.chosen[n_inputs, n_outputs] = name
            implementation = implementations_of(matrices[0], n_rows, rows)[name]
            for matrix in matrices:
                prepared = copies.prepared(matrix, (name, n_rows, rows), implementation)
                self._prepared[_address(matrix)] = prepared
                self.n_bytes += prepared.n_bytes
            copies.close_gaps()
        copies.keep()

    def __call__(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """x @ matrix + bias. x: (r, K). matrix: (K, N). bias: (N,). Returns (r, N)."""
        prepared = self._prepared.get(_address(matrix))
        return multiply(x, matrix, bias) if prepared is None else prepared(x, bias)


def _choose(matrices: Sequence[Matrix], n_rows: int, n_steps: int, rows: Rows, copies: Copies) -> str | None:
    """The name of the implementation for matrices of one kind, None for the reference's product.

    It does not depend on what is kept, because the same call has the same bits each time.
    """
    is_long = n_steps >= MIN_STEPS
    if not (is_long or isinstance(matrices[0], RoundedMatrix)):
        return None
    n_bytes = sum(matrix.shape.numel() for matrix in matrices) * rows.dtype.itemsize
    fits = has_memory_for(n_bytes)
    if is_long:
        known = {name: cost for name, cost in costs(matrices, n_rows, rows).items() if fits or not cost.copies}
        if copies.have_room_for(2 * n_bytes):
            known = {name: cost.if_kept() for name, cost in known.items()}
        return fastest(known, n_steps) if known else None
    # The reference would convert the matrix to floats in every step.
    first = next(iter(implementations_of(matrices[0], n_rows, rows)))
    is_copy = isinstance(matrices[0], Int4Matrix) or first.startswith("copy")
    return first if fits or not is_copy else None


def _address(matrix: Matrix) -> int:
    """Where the values of a matrix lie, which tells it from the others."""
    return _values(matrix).data_ptr()


def _values(matrix: Matrix) -> Tensor:
    return matrix.values if isinstance(matrix, RoundedMatrix) else matrix


def _by_kind(weights: DecodeWeights) -> Iterator[Sequence[Matrix]]:
    """The matrices of all blocks by their place in the block and how they are stored, and the head, each (K, N)."""
    layers = weights.layers
    for matrices in (
        [layer.qkv_weight for layer in layers],
        [layer.proj_weight for layer in layers],
        [layer.fc_weight for layer in layers],
        [layer.mlp_proj_weight for layer in layers],
        [head_matrix(weights)],
    ):
        by_layout: dict[tuple[int, ...], list[Matrix]] = {}
        for matrix in matrices:
            by_layout.setdefault(_values(matrix).stride(), []).append(matrix)
        yield from by_layout.values()
