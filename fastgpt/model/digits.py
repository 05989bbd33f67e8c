"""Products of float rows and int8 weights on a CPU in its int8 instructions, as accurate as those of the float rows or,
where that is asked for, of rows rounded to int8.

A row is written in base 256, as rows of bytes: x = step * sum of 256^i * digit_i. Their products with int8 values are
sums of whole numbers, which the processor adds without rounding, 64 at a time with AVX512 where it adds 16 floats. Four
rows of bytes take hardly longer than one, because reading the weights takes most of the time. The weights are a quarter
of float32's bytes.

r rows, K inputs, N outputs.
"""

import functools

import torch
from fastgpt_kernels.common.int8 import Int8Matrix
from torch import Tensor

# By the dtype whose accuracy is asked for. What the digits round off the largest input is at most 2^-7 of what that
# dtype does; int8 is the one digit itself, with a scale for each row.
N_DIGITS = {torch.int8: 1, torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}
# What a byte holds for the digit 0: digits are from -128 to 127.
_ZERO = 128
# The products of digits that are in memory at a time: more fall out of the caches, and every call allocates them anew.
_MAX_PRODUCTS = 2**20


class Stored:
    """torch's product of signed bytes, which reads the values where they lie."""

    n_bytes = 0

    def __init__(self, matrix: Int8Matrix, n_rows: int):
        self.matrix = matrix

    def __call__(self, whole: Tensor, places: Tensor) -> Tensor:
        """The product of rows and a matrix. whole: (r, 8 K) uint8, of which the first n of every 8 are the digits of an
        input, each plus _ZERO. places: (r, n) float32, by which the digits of a row count. Returns (r, N)."""
        digits = _by_place(_signed(whole), places)
        return _joined(torch._int_mm(digits, self.matrix.values.t()) * self.matrix.scale, places)


class Transposed(Stored):
    """The same product of the transposes, for a single row: its digits are read where they lie, too."""

    def __call__(self, whole: Tensor, places: Tensor) -> Tensor:
        (_, n_inputs), n_digits = self.matrix.values.shape, places.shape[1]
        columns = _signed(whole).as_strided((n_inputs, n_digits), (8, 1))
        sums = torch._int_mm(self.matrix.values, columns)  # (N, n)
        if n_digits == 1:
            return sums.t() * (self.matrix.scale * places)
        return torch.mm(places, sums.float().t()).mul_(self.matrix.scale)


class Packed:
    """oneDNN's product of unsigned and signed bytes, over a copy of the values in its own layout."""

    def __init__(self, matrix: Int8Matrix, n_rows: int):
        values, self.scale = matrix
        self.n_bytes = values.nbytes
        self.packed = torch.ops.onednn.qlinear_prepack(values.contiguous(), [n_rows, values.shape[1]])
        self.zero_points = torch.zeros(len(values), dtype=torch.int32, device=values.device)

    def __call__(self, whole: Tensor, places: Tensor) -> Tensor:
        """As of `Stored`."""
        digits = _by_place(whole, places)
        product = torch.ops.onednn.qlinear_pointwise.default(
            digits, 1.0, _ZERO, self.packed, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip
        return _joined(product, places)


Product = Stored | Packed


def _signed(whole: Tensor) -> Tensor:
    return whole.bitwise_xor(_ZERO).view(torch.int8)


def _by_place(whole: Tensor, places: Tensor) -> Tensor:
    """(r * n, K): the digits of a row's inputs that count the same, one row for each place."""
    n_rows, n_digits = places.shape
    n_inputs = whole.shape[1] // 8
    digits = whole.as_strided((n_rows, n_digits, n_inputs), (8 * n_inputs, 1, 8))
    return digits.contiguous().view(-1, n_inputs)


def _joined(product: Tensor, places: Tensor) -> Tensor:
    """(r, N) of the products (r * n, N) of the digits."""
    if places.shape[1] == 1:
        return product.mul_(places)
    return torch.bmm(places[:, None], product.unflatten(0, places.shape)).squeeze(1)


class Digits:
    """The product of float rows, written in digits, and an int8 matrix.

    precision: the dtype whose accuracy is asked for, a key of N_DIGITS. product: that of the digits.
    """

    def __init__(self, matrix: Int8Matrix, n_rows: int, precision: torch.dtype, product: type[Product]):
        self.n_digits = N_DIGITS[precision]
        n_rows_of_digits = self.n_digits * n_rows
        n_columns = max(1, _MAX_PRODUCTS // n_rows_of_digits)
        columns = zip(*(part.split(n_columns) for part in matrix), strict=True)
        self.products = [product(Int8Matrix(*part), n_rows_of_digits) for part in columns]
        self.n_bytes = sum(part.n_bytes for part in self.products)
        places = 256.0 ** torch.arange(self.n_digits, dtype=torch.float64, device=matrix.values.device)
        self.steps_of_largest = 127 * places.sum().item()  # of the largest input every digit is 127
        self.places = (places / self.steps_of_largest).float()[None]
        # From 2^52 to 2^53 the last bit of a float64 counts ones: a number added to this is rounded to a whole one, and
        # its digits, each plus _ZERO, are the low bytes of the sum.
        self.start = 2.0**52 + _ZERO * places.sum()[None]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ matrix + bias. x: (r, K), contiguous, at most float32. bias: (N,). Returns (r, N)."""
        largest = _largest(x)
        # `start` makes this float64. A row of zeros divides 0 by 0: the bytes of its NaN are multiplied by 0 below.
        whole = torch.addcdiv(self.start, x.float(), largest, value=self.steps_of_largest).view(torch.uint8)  # (r, 8 K)
        places = largest * self.places
        joined = [multiply(whole, places) for multiply in self.products]
        product = joined[0] if len(joined) == 1 else torch.cat(joined, 1)
        return (product if bias is None else product.add_(bias)).to(x.dtype)


def _largest(x: Tensor) -> Tensor:
    """(r, 1) float32: of each row."""
    return torch.linalg.vector_norm(x.float(), torch.inf, 1, keepdim=True)


def rounded(x: Tensor) -> Tensor:
    """The rows whose products one digit gives: rounded to int8, with a scale for each. Returns float64."""
    largest = _largest(x).clamp(min=torch.finfo(torch.float32).tiny)
    return (127 * x.double() / largest).round() * (largest / 127)


@functools.cache
def is_exact(product: type[Product]) -> bool:
    """Whether this torch has that product of bytes, and it does not overflow on this processor.

    Without instructions such as VNNI oneDNN adds pairs of products in 16 bits, where the largest have no room.
    """
    ones = torch.ones(1, 64, dtype=torch.float32, device="cpu")
    largest = Int8Matrix(ones.new_full((16, 64), 127, dtype=torch.int8), ones[0, :16])
    try:
        sums = Digits(largest, 1, torch.float32, product)(ones, None)
    except (AttributeError, RuntimeError):
        return False
    return bool(sums.sub(64 * 127).abs().max() < 1)
