"""The implementations of a CPU's product of few rows and a matrix of a model. `products` chooses among them.

torch's own product of few rows may read a matrix with one core of several, at a fraction of the memory's bandwidth.
Others multiply slices of the matrix at the same time, its transpose, its columns one by one, or a copy in oneDNN's
layout. An int8 matrix is multiplied as it is stored, or from a copy, in the processor's instructions for int8
(`digits`), as a sum of its rows (`bags`) or in floats, by any implementation for these; an int4 matrix from a copy in
torch's layout, or as int8. An implementation that errs far more than torch's own product is not taken, however fast it
is.

r rows, K inputs, N outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.decode_weights import Matrix, RoundedMatrix
from fastgpt_kernels.common.int4 import Int4Matrix
from fastgpt_kernels.common.int8 import Int8Matrix
from fastgpt_kernels.operations.decode_step.reference import multiply
from torch import Tensor

from ..model import digits
from .bags import Bags, adds_bytes

# --- one implementation ---------------------------------------------------------------------------------------------


class Prepared(Protocol):
    """A matrix (K, N), ready for one implementation. n_bytes: of the copy that it holds, 0 for a view."""

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


class DotProducts:
    """torch's product of a matrix stored by columns and a single row in half precision: for each output a dot product.

    It needs less code than oneDNN's, which in a step has left the caches when it is called. Of a matrix stored by rows
    it holds a copy.
    """

    def __init__(self, matrix: Tensor):
        self.columns = matrix.t().contiguous()  # (N, K)
        self.n_bytes = 0 if matrix.t().is_contiguous() else matrix.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        row = x.squeeze(0)
        product = torch.mv(self.columns, row) if bias is None else torch.addmv(bias, self.columns, row)
        return product[None]


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
    """A float copy of an int8 matrix, multiplied by an implementation for its dtype."""

    def __init__(self, matrix: Int8Matrix, dtype: torch.dtype, implementation: "Implementation"):
        copy = matrix.to_float(dtype).contiguous()
        self.prepared = implementation(copy)
        self.n_bytes = self.prepared.n_bytes or copy.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.prepared(x, bias)


class Int4Values:
    """torch's product of rows and int4 values, over a copy in its own layout, then the scales.

    Rows are rounded to bfloat16, for which alone it is fast; its steps are exact there.
    """

    def __init__(self, matrix: Int4Matrix):
        n_outputs = len(matrix.values)
        padding = -n_outputs % _INT4_COLUMNS
        self.scale, self.n_outputs, self.group_size = matrix.scale, n_outputs, matrix.group_size
        self.packed = torch._convert_weight_to_int4pack_for_cpu(F.pad(matrix.unpacked(), (0, 0, 0, padding)).int(), 1)
        steps = F.pad(matrix.steps, (0, 0, 0, padding)).t().bfloat16()
        self.steps = torch.stack((steps, torch.zeros_like(steps)), -1)  # (groups, N, 2), without zero points
        self.n_bytes = self.packed.nbytes + self.steps.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), self.packed, self.group_size, self.steps)
        product = product[:, : self.n_outputs] * self.scale
        return (product if bias is None else product + bias).to(x.dtype)


# What torch's product wants the columns of a matrix to be a multiple of.
_INT4_COLUMNS = 16


class AsInt8:
    """An int4 matrix, unpacked to int8 and multiplied by an implementation for that."""

    def __init__(self, matrix: Int4Matrix, implementation: "Implementation"):
        unpacked = matrix.to_int8()
        self.prepared = implementation(unpacked)
        self.n_bytes = self.prepared.n_bytes or unpacked.values.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.prepared(x, bias)


Implementation = Callable[[Any], Prepared]


# --- those of a matrix ----------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows of a product with a rounded matrix. dtype: theirs. precision: the dtype to which they may be rounded.

    That may be int8, beside an int8 matrix, where the processor's instructions for it are exact.
    """

    dtype: torch.dtype
    precision: torch.dtype


def implementations_of(matrix: Matrix, n_rows: int, rows: Rows | None = None) -> dict[str, Implementation]:
    """What can multiply n_rows rows by a matrix (K, N), stored by rows or by columns. The first is taken untimed.

    rows: needed for a rounded matrix, which has no dtype for them.
    """
    if isinstance(matrix, RoundedMatrix):
        assert rows is not None
        of_kind = _int8_implementations if isinstance(matrix, Int8Matrix) else _int4_implementations
        return of_kind(matrix.shape, n_rows, rows)
    found: dict[str, Implementation] = {"as stored": AsStored}
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
    if n_rows == 1 and matrix.dtype in (torch.float16, torch.bfloat16):
        found["dot products"] = DotProducts
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
    x, transposed = values.normal_(generator=torch.Generator("cpu").manual_seed(0)).to(dtype).split((1, 16))
    matrix = transposed.t()
    try:
        packed = Packed(matrix, 1)(x, None)
    except (AttributeError, RuntimeError):
        return False
    return exactness(matrix, x, dtype)(packed)


_DIGITS = {"digits": digits.Stored, "transposed digits": digits.Transposed, "packed digits": digits.Packed}


def _int4_implementations(shape: torch.Size, n_rows: int, rows: Rows) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {
        f"as int8, {name}": lambda matrix, of_int8=of_int8: AsInt8(matrix, of_int8)
        for name, of_int8 in _int8_implementations(shape, n_rows, rows).items()
    }
    # Not the first, because processors for which torch has no code of its own multiply int4 far slower than int8.
    return found | ({"int4": Int4Values} if rows.precision == torch.bfloat16 and multiplies_int4() else {})


@functools.cache
def multiplies_int4() -> bool:
    """Whether torch has a product of int4 values here, about as exact as its own in bfloat16."""
    x, weights = (
        torch.empty(97, 128, device="cpu").normal_(generator=torch.Generator("cpu").manual_seed(0)).split((1, 96))
    )
    matrix, x = Int4Matrix.nearest(weights.t(), 32), x.bfloat16()
    try:
        product = Int4Values(matrix)(x, None)
    except (AttributeError, RuntimeError):
        return False
    return exactness(matrix, x, torch.bfloat16)(product)


def _int8_implementations(shape: torch.Size, n_rows: int, rows: Rows) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {
        name: lambda matrix, product=product: digits.Digits(matrix, n_rows, rows.precision, product)
        for name, product in _DIGITS.items()
        if rows.precision in digits.N_DIGITS and digits.is_exact(product)
        if n_rows == 1 or product is not digits.Transposed
    }
    if rows.precision in (torch.float16, torch.bfloat16, torch.float32) and adds_bytes():
        found["bags"] = Bags
    if "digits" in found and rows.precision in (torch.float32, torch.int8):
        return found  # As exact as a float copy, about as fast or faster, and faster than timing one.
    copies = implementations_of(torch.empty(shape, dtype=rows.dtype, device="meta"), n_rows)
    in_floats: dict[str, Implementation] = {
        f"copy, {name}": lambda matrix, of_copy=of_copy: FloatCopy(matrix, rows.dtype, of_copy)
        for name, of_copy in copies.items()
    }
    # torch's product reads K in steps of 16, and past the end of another. Without the scales float16 would overflow.
    if shape[0] % 16 == 0 and rows.precision in (torch.bfloat16, torch.float32):
        int8 = {"int8": lambda matrix: Int8Values(matrix, rows.precision)}
        in_floats = in_floats | int8 if rows.precision == torch.float32 else int8 | in_floats
    return in_floats | found


# --- exactness ------------------------------------------------------------------------------------------------------

# Another implementation may err this many times as much as torch's own, root mean square. Sums in another order reach
# 4; rows in bfloat16 where the model is in float32, and sums that overflow, are far beyond.
_MAX_ERROR = 8


def exactness(matrix: Matrix, x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], bool]:
    """What tells whether a product of x and a matrix is nearly as exact as torch's in a dtype, by some columns."""
    some = slice(None, None, max(1, matrix.shape[1] // 256))
    part = columns(matrix, some)
    exact = multiply(x.double(), part if isinstance(part, RoundedMatrix) else part.double(), None)
    allowed = _MAX_ERROR * (multiply(x.to(dtype), part, None) - exact).square().mean() ** 0.5
    return lambda product: bool((product[:, some] - exact).square().mean() ** 0.5 <= allowed)


def columns(matrix: Matrix, which: slice) -> Matrix:
    """Some columns of a matrix (K, N), as a view."""
    return type(matrix)(*(part[which] for part in matrix)) if isinstance(matrix, RoundedMatrix) else matrix[:, which]
