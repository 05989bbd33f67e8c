"""Products of float rows and int8 weights on a CPU in its int8 instructions, as accurate as those of the float rows or,
where that is asked for, of rows rounded to int8.

A row is written in base 256, as rows of bytes: x = step * sum of 256^i * digit_i. Their products with int8 values are
sums of whole numbers, which the processor adds without rounding, 64 at a time with AVX512 where it adds 16 floats. Four
rows of bytes take hardly longer than one, because reading the weights takes most of the time. The weights are a quarter
of float32's bytes. This is the Ozaki scheme on integer units (arXiv 2409.13313) with one of the two matrices in int8
already: only the other has to be split.

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
# The products of digits that are in memory at a time: more do not fit into the caches.
_MAX_PRODUCTS = 2**20


class Stored:
    """torch's product of signed bytes, which reads the values where they lie."""

    n_bytes = 0

    def __init__(self, matrix: Int8Matrix, n_rows: int):
        self.matrix = matrix

    def __call__(self, digits: Tensor, places: Tensor) -> Tensor:
        """The product of rows and a matrix. digits: (r, K, n) int8. places: (r, n) float32, by which the digits of a
        row count. Returns (r, N)."""
        sums = torch._int_mm(_by_place(digits), self.matrix.values.t())
        return _joined(sums.float().mul_(self.matrix.scale), places)


class Transposed(Stored):
    """The same product of the transposes, for a single row: its digits are read where they lie, too."""

    def __call__(self, digits: Tensor, places: Tensor) -> Tensor:
        sums = torch._int_mm(self.matrix.values, digits[0])  # (N, n)
        if places.shape[1] == 1:
            return sums.t() * (self.matrix.scale * places)
        return torch.mm(places, sums.float().t()).mul_(self.matrix.scale)


class Packed:
    """oneDNN's product of unsigned and signed bytes, over a copy of the values in its own layout."""

    def __init__(self, matrix: Int8Matrix, n_rows: int):
        values, self.scale = matrix
        self.n_bytes = values.nbytes
        self.packed = torch.ops.onednn.qlinear_prepack(values.contiguous(), [n_rows, values.shape[1]])
        self.zero_points = torch.zeros(len(values), dtype=torch.int32, device=values.device)

    def __call__(self, digits: Tensor, places: Tensor) -> Tensor:
        """As `Stored.__call__`."""
        unsigned = _by_place(digits).view(torch.uint8).bitwise_xor(_ZERO)  # each plus _ZERO
        product = torch.ops.onednn.qlinear_pointwise.default(
            unsigned, 1.0, _ZERO, self.packed, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip
        return _joined(product, places)


Product = Stored | Packed


def _by_place(digits: Tensor) -> Tensor:
    """(r * n, K), dense: the digits of a row's inputs that count the same, one row for each place."""
    return digits.transpose(1, 2).reshape(-1, digits.shape[1])


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
        digits, places = _one_digit(x) if self.n_digits == 1 else self._several_digits(x)
        joined = [multiply(digits, places) for multiply in self.products]
        product = joined[0] if len(joined) == 1 else torch.cat(joined, 1)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def _several_digits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The digits (r, K, n) int8, eight bytes from one input to the next, and their places (r, n) float32."""
        largest = _largest(x)
        # `start` makes this float64. A row of zeros divides 0 by 0: the bytes of its NaN are multiplied by 0 later.
        whole = torch.addcdiv(self.start, x.float(), largest, value=self.steps_of_largest).view(torch.uint8)  # (r, 8 K)
        signed = whole.bitwise_xor(_ZERO).view(torch.int8).unflatten(1, (-1, 8))
        return signed[..., : self.n_digits], largest * self.places


def _one_digit(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `Digits._several_digits`, of rows that are rounded to whole multiples of a 127th of their largest input."""
    step = _largest(x) / 127
    # As there, a row of zeros has NaN here, and a step of 0.
    return (x / step).round_().to(torch.int8)[..., None], step


def _largest(x: Tensor) -> Tensor:
    """(r, 1) float32: of each row. In two passes, because torch takes ten times as long for this norm in one."""
    return x.abs().amax(1, keepdim=True).float()


def rounded(x: Tensor) -> Tensor:
    """The rows whose products one digit gives, each input rounded to int8. Returns float64."""
    digits, step = _one_digit(x)
    return digits.squeeze(-1).double() * step.double()


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
