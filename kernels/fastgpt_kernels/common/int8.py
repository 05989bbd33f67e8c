"""A matrix as int8 values and one float32 scale for each column."""

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST = 127
# A scale has 17 significant bits and a value 7, so that their product is a float32 without rounding: the matrix in
# float32 is exact, and rounding it again gives the same values and scales.
_DROPPED_BITS = 7


class Int8Matrix(NamedTuple):
    """A matrix (in, out) whose column n is values[n] * scale[n].

    values: (out, in) int8, from -127 to 127: transposed, so that the values of a column are neighbours in memory.
    scale: (out,) float32.
    """

    values: Tensor
    scale: Tensor

    kind = "int8"

    @classmethod
    def nearest(cls, matrix: Tensor) -> "Int8Matrix":
        """Round a floating-point matrix (in, out) to the nearest values, of which the largest of a column is 127.

        A column of zeros, or of numbers below 1e-36, has the scale 1 and is zero.
        Raises ValueError when the matrix holds NaN or Inf.
        """
        columns = _in_float64(matrix.detach()).t()
        largest = columns.abs().amax(1)
        if not largest.is_meta and not largest.isfinite().all():
            raise ValueError("a matrix that holds NaN or Inf has no int8 values")
        scale = exact_scale(largest, _LARGEST)
        values = (columns / scale[:, None]).round().to(torch.int8).contiguous()
        return cls(values.to(matrix.device), scale.to(matrix.device))

    @property
    def shape(self) -> torch.Size:
        """(in, out)."""
        return self.values.t().shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to_int8(self) -> "Int8Matrix":
        """The matrix itself, so that it can be called like an `Int4Matrix`, which is an int8 matrix in fewer bytes."""
        return self

    def to_float(self, dtype: torch.dtype) -> Tensor:
        """The matrix (in, out) in a floating-point dtype, a view of (out, in); exact in float32 and float64."""
        return (self.values * self.scale[:, None]).to(dtype).t()


def exact_scale(largest: Tensor, largest_value: int) -> Tensor:
    """The scale (out,) float32, with few bits, of columns whose largest numbers `largest_value` stands for.

    1 for a column of zeros, or of numbers below 1e-36.
    """
    bits = (largest / largest_value).float().view(torch.int32)
    scale = ((bits + (1 << _DROPPED_BITS - 1)) & -(1 << _DROPPED_BITS)).view(torch.float32)
    return scale.where(scale >= torch.finfo(torch.float32).tiny, 1.0)


def _in_float64(matrix: Tensor) -> Tensor:
    """On its device, or on the CPU if that device has no float64, as Apple's GPUs."""
    try:
        return matrix.double()
    except TypeError:
        return matrix.cpu().double()
