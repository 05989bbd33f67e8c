"""The products of a decode step on a CPU: few rows by a model's matrices, each in the way that is fastest here.

torch's own product of few rows may read a matrix with one core of several, at a fraction of the memory's bandwidth.
Which other way is faster depends on the processor, its free cores, the rows, the shape and the dtype, so it is timed:
once a process for each of these, at the first generation that is long enough to gain from it.

An int8 matrix is multiplied as it is stored, or from a copy, in the processor's instructions for int8 (`digits`) or in
floats, in any way of them. A way that errs far more than torch's own product is not taken, however fast it is.

r rows, K inputs, N outputs.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from fastgpt_kernels.common.decode_weights import DecodeWeights, Matrix
from fastgpt_kernels.common.int8 import Int8Matrix
from fastgpt_kernels.operations.decode_step.reference import head_matrix, multiply
from torch import Tensor

import fastgpt.model.digits as digits

# --- ways -----------------------------------------------------------------------------------------------------------


class Prepared(Protocol):
    """A matrix (K, N), ready for one way. n_bytes: of the copy that it holds, 0 for a view."""

    n_bytes: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ matrix + bias. x: (r, K), contiguous. bias: (N,). Returns (r, N)."""
        ...


class AsStored:
    """torch's own product."""

    n_bytes = 0

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(x, self.matrix, bias)


class Transposed(AsStored):
    """torch's product of the transposes."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = torch.mm(self.matrix.t(), x.t()).t()
        return product if bias is None else product + bias


class InputSlices:
    """A matrix stored by rows as slices of K, which cores multiply at the same time; then the sum of their products."""

    n_bytes = 0

    def __init__(self, matrix: Tensor, n_slices: int):
        self.slices = matrix.view(n_slices, -1, matrix.shape[1])  # (S, K/S, N)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        n_slices, n_inputs, _ = self.slices.shape
        product = torch.bmm(x.view(-1, n_slices, n_inputs).transpose(0, 1), self.slices).sum(0)
        return product if bias is None else product.add_(bias)


class OutputSlices:
    """A matrix stored by columns as slices of N, which cores multiply at the same time, and the few columns left."""

    n_bytes = 0

    def __init__(self, matrix: Tensor, n_slices: int):
        n_sliced = matrix.shape[1] // n_slices * n_slices
        self.slices = matrix[:, :n_sliced].unflatten(1, (n_slices, -1)).transpose(0, 1)  # (S, K, N/S)
        self.rest = matrix[:, n_sliced:]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        sliced = torch.bmm(x.expand(len(self.slices), *x.shape), self.slices).transpose(0, 1).flatten(1)
        product = torch.cat((sliced, x @ self.rest), 1)
        return product if bias is None else product.add_(bias)


class OneDNN(AsStored):
    """oneDNN's product, which uses all cores for few rows too."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix.t(), bias, "none", [], "")


class Packed:
    """oneDNN's product over a copy in its own layout."""

    def __init__(self, matrix: Tensor, n_rows: int):
        self.n_bytes = matrix.nbytes
        self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix.t(), n_rows)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class Int8Values:
    """torch's product of rows and int8 values, then the scales: no copy. Rows are rounded to `dtype`."""

    n_bytes = 0

    def __init__(self, matrix: Int8Matrix, dtype: torch.dtype):
        # The scales would be rounded to the dtype of the rows, so they follow in float32.
        self.matrix, self.dtype, self.ones = matrix, dtype, torch.ones_like(matrix.scale, dtype=dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = torch._weight_int8pack_mm(x.to(self.dtype), self.matrix.values, self.ones) * self.matrix.scale
        return (product if bias is None else product + bias).to(x.dtype)


class FloatCopy:
    """A float copy of an int8 matrix, multiplied in a way of its dtype."""

    def __init__(self, matrix: Int8Matrix, dtype: torch.dtype, way: "Way"):
        copy = matrix.to_float(dtype).contiguous()
        self.prepared = way(copy)
        self.n_bytes = self.prepared.n_bytes or copy.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.prepared(x, bias)


Way = Callable[[Any], Prepared]


class Rows(NamedTuple):
    """The rows of a product with an int8 matrix. dtype: theirs. precision: the dtype to which they may be rounded.

    That may be int8 where the processor's instructions for it are exact.
    """

    dtype: torch.dtype
    precision: torch.dtype


def ways(matrix: Matrix, n_rows: int, rows: Rows | None = None) -> dict[str, Way]:
    """What can multiply n_rows rows by a matrix (K, N), stored by rows or by columns. The first is taken untimed.

    rows: needed for an int8 matrix, which has no dtype for them.
    """
    if isinstance(matrix, Int8Matrix):
        assert rows is not None
        return _int8_ways(matrix, n_rows, rows)
    found: dict[str, Way] = {"as stored": AsStored}
    by_rows, by_columns = matrix.is_contiguous(), matrix.t().is_contiguous()
    if by_columns:
        found["transposed"] = Transposed
    # The products of the slices of K are rounded before they are added, which half precision would notice.
    adds_exactly = matrix.dtype.itemsize > 2
    for n_slices in (2, 4):
        if by_rows and adds_exactly and matrix.shape[0] % n_slices == 0:
            found[f"{n_slices} slices"] = lambda matrix, n_slices=n_slices: InputSlices(matrix, n_slices)
        elif by_columns:
            found[f"{n_slices} slices"] = lambda matrix, n_slices=n_slices: OutputSlices(matrix, n_slices)
    if packs(matrix.dtype):
        if matrix.dtype == torch.float32:  # In half precision it is what torch's own product takes.
            found["oneDNN"] = OneDNN
        found["packed"] = lambda matrix: Packed(matrix, n_rows)
    return found


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed matrices of a dtype on this processor, and about as exactly as torch does.

    It needs the processor's instructions for the dtype and raises without them. On ARM it adds float16 in float16.
    """
    values = torch.empty(17, 1024, dtype=torch.float32, device="cpu")
    x, columns = values.normal_(generator=torch.Generator("cpu").manual_seed(0)).to(dtype).split((1, 16))
    matrix = columns.t()
    try:
        packed = Packed(matrix, 1)(x, None)
    except (AttributeError, RuntimeError):
        return False
    return _exactness(matrix, x, dtype)(packed)


_DIGITS = {"digits": digits.Stored, "transposed digits": digits.Transposed, "packed digits": digits.Packed}


def _int8_ways(matrix: Int8Matrix, n_rows: int, rows: Rows) -> dict[str, Way]:
    in_digits: dict[str, Way] = {
        name: lambda matrix, product=product: digits.Digits(matrix, n_rows, rows.precision, product)
        for name, product in _DIGITS.items()
        if rows.precision in digits.N_DIGITS and digits.is_exact(product)
        if n_rows == 1 or product is not digits.Transposed
    }
    if "digits" in in_digits and rows.precision in (torch.float32, torch.int8):
        return in_digits  # As exact as a float copy, about as fast without any, and faster than timing one.
    copies = ways(torch.empty(matrix.shape, dtype=rows.dtype, device="meta"), n_rows)
    found: dict[str, Way] = {
        f"copy, {name}": lambda matrix, way=way: FloatCopy(matrix, rows.dtype, way) for name, way in copies.items()
    }
    # torch's product reads K in steps of 16, and past the end of another. Without the scales float16 would overflow.
    if matrix.shape[0] % 16 == 0 and rows.precision in (torch.bfloat16, torch.float32):
        int8 = {"int8": lambda matrix: Int8Values(matrix, rows.precision)}
        found = found | int8 if rows.precision == torch.float32 else int8 | found
    return found | in_digits


# --- half precision -------------------------------------------------------------------------------------------------


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies a half-precision dtype far slower than float32, because it lacks the instructions.

    Timed once a process, in a few milliseconds. Without the instructions the factor is about 50, with them at most 2.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    seconds = {}
    for kind in (dtype, torch.float32):
        x, times = torch.ones(16, 256, dtype=kind, device="cpu"), []
        matrix = x.new_ones(256, 256)
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(x, matrix)
            times.append(time.perf_counter() - start)
        seconds[kind] = min(times)
    return seconds[dtype] > 8 * seconds[torch.float32]


def has_memory_for(n_bytes: int) -> bool:
    """Whether copies of weights of this size leave at least half of the free memory."""
    return n_bytes <= psutil.virtual_memory().available // 2


# --- the choice -----------------------------------------------------------------------------------------------------

# Timing the ways takes as long as two to four steps, and fewer steps than these may not earn it back.
MIN_STEPS = 16
# Another way must gain this much over the first, because a gain within the noise would change bits for nothing.
_MIN_GAIN = 1.1
_TURNS = 5
# A way whose first product took this many times as long as the quickest is not timed further.
_HOPELESS = 8
# Another way may err this many times as much as torch's own, root mean square. Sums in another order reach 4; rows in
# bfloat16 where the model is in float32, and sums that overflow, are far beyond.
_MAX_ERROR = 8


class Cost(NamedTuple):
    """Of one way and one matrix, in seconds. copies: whether it holds a copy of the matrix."""

    prepare: float
    multiply: float
    copies: bool

    def of(self, n_steps: int) -> float:
        return self.prepare + n_steps * self.multiply


_measured: dict[tuple, dict[str, Cost]] = {}


def costs(matrices: Sequence[Matrix], n_rows: int, rows: Rows | None = None) -> dict[str, Cost]:
    """The cost of each way, by its name, measured when a process first asks for matrices of this kind."""
    matrix = matrices[0]
    how = rows if isinstance(matrix, Int8Matrix) else (matrix.stride(), matrix.dtype)
    kind = n_rows, matrix.shape, how, torch.get_num_threads()
    if kind not in _measured:
        _measured[kind] = _measure(matrices, n_rows, rows)
    return _measured[kind]


def _measure(matrices: Sequence[Matrix], n_rows: int, rows: Rows | None) -> dict[str, Cost]:
    # Of the head, which is large and the only one, two quarters.
    first, samples = matrices[0], (matrices[0], matrices[-1])
    if len(matrices) == 1 and (isinstance(first, Int8Matrix) or not first.is_contiguous()):
        quarter = -(-first.shape[1] // 4)
        samples = tuple(_columns(first, slice(start, start + quarter)) for start in (0, quarter))
    n_inputs, n_outputs = samples[0].shape
    if isinstance(first, Tensor):
        rows = Rows(first.dtype, first.dtype)
    assert rows is not None  # `ways` needs it for an int8 matrix
    x = torch.empty(n_rows, n_inputs, dtype=rows.dtype, device="cpu")
    x.normal_(generator=torch.Generator("cpu").manual_seed(0))
    bias = x.new_zeros(n_outputs)
    if rows.precision == torch.int8:
        is_exact = _exactness(samples[0], digits.rounded(x), rows.dtype)
    else:
        is_exact = _exactness(samples[0], x.to(rows.precision), rows.precision)
    prepared: dict[str, list[Prepared]] = {}
    prepare_s, multiply_s = {}, {}
    for name, way in ways(samples[0], n_rows, rows).items():
        start = time.perf_counter()
        products = [way(sample) for sample in samples]
        prepare_s[name], multiply_s[name] = (time.perf_counter() - start) / len(samples), []
        if is_exact(products[0](x, bias)):
            if not products[0].n_bytes:
                products += map(way, matrices[1:-1])
            prepared[name] = products
    places = itertools.count()
    for turn in range(_TURNS):
        quickest = min((seconds for timed in multiply_s.values() for seconds in timed), default=float("inf"))
        for name, products in prepared.items():
            if turn and min(multiply_s[name]) > _HOPELESS * quickest:
                continue
            # As in a step, the processor has the way's code in its near caches, and of the matrix nothing: the way
            # before, which may have read the same memory, multiplied another one.
            products[next(places) % len(products)](x, bias)
            start = time.perf_counter()
            products[next(places) % len(products)](x, bias)
            multiply_s[name].append(time.perf_counter() - start)
    return {
        name: Cost(prepare_s[name], median(multiply_s[name]), products[0].n_bytes > 0)
        for name, products in prepared.items()
    }


def _exactness(matrix: Matrix, x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], bool]:
    """What tells whether a product of x and a matrix is nearly as exact as torch's in a dtype, by some columns."""
    some = slice(None, None, max(1, matrix.shape[1] // 256))
    part = _columns(matrix, some)
    exact = multiply(x.double(), part if isinstance(part, Int8Matrix) else part.double(), None)
    allowed = _MAX_ERROR * (multiply(x.to(dtype), part, None) - exact).square().mean() ** 0.5
    return lambda product: bool((product[:, some] - exact).square().mean() ** 0.5 <= allowed)


def _columns(matrix: Matrix, which: slice) -> Matrix:
    return Int8Matrix(*(part[which] for part in matrix)) if isinstance(matrix, Int8Matrix) else matrix[:, which]


def fastest(known: dict[str, Cost], n_steps: int) -> str:
    """The way that costs least over n_steps steps, or the first, which needs no timing, where the gain is small."""
    first = next(iter(known))
    best = min(known, key=lambda name: known[name].of(n_steps))
    # Where the first converts int8 to floats, so do others, and that says nothing about the gain.
    shared = known[first].prepare
    gains = known[first].of(n_steps) - shared > _MIN_GAIN * (known[best].of(n_steps) - shared)
    return best if gains else first


class Products:
    """The products of one call of `generate()`: call it as `torch.addmm` of a matrix of the model.

    n_rows: rows of a step. n_steps: the most steps of the call. precision: the dtype of the user's model, or int8 if
    the rows that int8 weights multiply may be rounded to it. Where the weights are on a CPU and the steps many, the way
    of each matrix is chosen: `chosen` names it by the shape (K, N). It may hold copies of the matrices, n_bytes in all,
    as long as this object lives.
    """

    def __init__(self, weights: DecodeWeights, n_rows: int, n_steps: int, precision: torch.dtype | None = None):
        self.chosen: dict[tuple[int, int], str] = {}
        self.n_bytes = 0
        self._prepared: dict[int, Prepared] = {}
        if weights.wte.device.type != "cpu":
            return
        dtype = weights.wte.dtype
        if precision is None or (precision == torch.int8 and not digits.is_exact(digits.Stored)):
            precision = dtype
        rows = Rows(dtype, precision)
        for matrices in _by_shape(weights):
            name = _choose(matrices, n_rows, n_steps, rows)
            if name is None:
                continue
            n_inputs, n_outputs = matrices[0].shape
            self.chosen[n_inputs, n_outputs] = name
            for matrix in matrices:
                prepared = ways(matrix, n_rows, rows)[name](matrix)
                self._prepared[_place(matrix)] = prepared
                self.n_bytes += prepared.n_bytes

    def __call__(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """x @ matrix + bias. x: (r, K). matrix: (K, N). bias: (N,). Returns (r, N)."""
        prepared = self._prepared.get(_place(matrix))
        return multiply(x, matrix, bias) if prepared is None else prepared(x, bias)


def _choose(matrices: Sequence[Matrix], n_rows: int, n_steps: int, rows: Rows) -> str | None:
    """The name of the way for matrices of one kind, None for the reference's product."""
    is_int8 = isinstance(matrices[0], Int8Matrix)
    n_bytes = sum(matrix.shape.numel() for matrix in matrices) * rows.dtype.itemsize
    fits = has_memory_for(n_bytes)
    if n_steps >= MIN_STEPS:
        known = {name: cost for name, cost in costs(matrices, n_rows, rows).items() if fits or not cost.copies}
        return fastest(known, n_steps) if known else None
    if not is_int8:
        return None
    # The reference would convert the matrix to floats in every step.
    first = next(iter(ways(matrices[0], n_rows, rows)))
    return first if fits or not first.startswith("copy") else None


def _place(matrix: Matrix) -> int:
    """What tells a matrix from the others."""
    return matrix.values.data_ptr() if isinstance(matrix, Int8Matrix) else matrix.data_ptr()


def _by_shape(weights: DecodeWeights) -> Iterator[Sequence[Matrix]]:
    """The matrices of all blocks by their place in the block, and the head, each (K, N)."""
    layers = weights.layers
    yield [layer.qkv_weight for layer in layers]
    yield [layer.proj_weight for layer in layers]
    yield [layer.fc_weight for layer in layers]
    yield [layer.mlp_proj_weight for layer in layers]
    yield [head_matrix(weights)]
