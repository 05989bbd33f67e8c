"""A matrix as int4 values, a step for each group of them, and one float32 scale for each column.

Two levels of scales, of which the inner ones, the steps, are whole numbers: what QServe (arXiv 2405.04532) calls
progressive group quantisation. Here it has no zero points.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .int8 import Int8Matrix, exact_scale

# Of two values in a byte the first is the low half. A half holds a value plus this.
ZERO = 8
_LOWEST, _HIGHEST = -8, 7
# A step times a value is at most 120, so that it is a value of int8 itself.
_LARGEST_STEP = 15
# How many steps the largest weight of a group is: of these steps that of the least squared error is taken. Up to 8
# nothing is cut off; above, the largest weights are, and the others are rounded more finely. The error of a normal
# matrix is within a thousandth of that with 40 candidates from 5 to 14.
_STEPS_OF_LARGEST = 7.5, 8.0, 8.5, 9.0, 10.0
# Weights whose steps are searched at a time, so that they stay in the caches.
_MAX_SEARCHED = 2**18

GROUP_SIZES = (32, 64, 128)  # those that torch's product on a CPU takes, but for 256


class Int4Matrix(NamedTuple):
    """A matrix (in, out), whose weight k of column n is scale[n] * steps[n, k // group] * (the value k of row n).

    As steps and values are whole numbers whose products are values of int8, this is an `Int8Matrix` in fewer bytes.

    values: (out, in / 2) uint8: two from -8 to 7 in a byte, each plus 8, the first of them in the low half.
    steps: (out, in / group) int8, from -15 to 15, never 0: negative where the largest weight of a group is positive,
    because of the values that lie farthest from 0 only the negative one, -8, exists.
    scale: (out,) float32.
    """

    values: Tensor
    steps: Tensor
    scale: Tensor

    kind = "int4"

    @classmethod
    def nearest(cls, matrix: Tensor, group_size: int) -> "Int4Matrix":
        """Round a floating-point matrix (in, out), with a step for every group_size weights of a column.

        A column of zeros, or of numbers below 1e-36, has the scale 1 and is zero.
        Raises ValueError when group_size does not divide `in`, and when the matrix holds NaN or Inf.
        """
        n_inputs, n_outputs = matrix.shape
        if n_inputs % group_size:
            raise ValueError(f"groups of {group_size} do not divide {n_inputs} inputs")
        if matrix.is_meta:  # There are no weights to search steps for.
            shapes = ((n_outputs, n_inputs // 2), torch.uint8), ((n_outputs, n_inputs // group_size), torch.int8)
            sizes = *shapes, ((n_outputs,), torch.float32)
            return cls(*(matrix.new_empty(shape, dtype=dtype) for shape, dtype in sizes))
        columns = matrix.detach().t()
        parts = columns.split(max(1, _MAX_SEARCHED // n_inputs))
        return cls(*map(torch.cat, zip(*(_nearest(part.float(), group_size) for part in parts), strict=True)))

    @property
    def shape(self) -> torch.Size:
        """(in, out)."""
        n_outputs, n_bytes = self.values.shape
        return torch.Size((2 * n_bytes, n_outputs))

    @property
    def group_size(self) -> int:
        return self.shape[0] // self.steps.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def unpacked(self) -> Tensor:
        """The values (out, in), each plus 8, in uint8."""
        return torch.stack((self.values & 15, self.values >> 4), -1).flatten(1)

    def to_int8(self) -> Int8Matrix:
        """The same matrix, exactly."""
        values = (self.unpacked().view(torch.int8) - ZERO).unflatten(1, (-1, self.group_size))
        return Int8Matrix((values * self.steps[..., None]).flatten(1), self.scale)

    def to_float(self, dtype: torch.dtype) -> Tensor:
        """The matrix (in, out) in a floating-point dtype, a view of (out, in); exact in float32 and float64."""
        return self.to_int8().to_float(dtype)


def _nearest(columns: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Int4Matrix.nearest` of columns (out, in)."""
    largest = columns.abs().amax(1)
    if not largest.isfinite().all():
        raise ValueError("a matrix that holds NaN or Inf has no int4 values")
    scale = exact_scale(largest, -_LOWEST * _LARGEST_STEP)
    groups = (columns / scale[:, None]).unflatten(1, (-1, group_size))
    peaks = groups.abs().amax(-1, keepdim=True)
    best_values = best_steps = least = groups.new_full(peaks.shape, torch.inf)
    for n_steps in _STEPS_OF_LARGEST:
        for sign in (-1, 1):
            steps = (peaks / n_steps).round_().clamp_(1, _LARGEST_STEP).mul_(sign)
            values = (groups / steps).round_().clamp_(_LOWEST, _HIGHEST)
            errors = (groups - values * steps).square_().sum(-1, keepdim=True)
            is_better = errors < least
            least = errors.where(is_better, least)
            best_values, best_steps = values.where(is_better, best_values), steps.where(is_better, best_steps)
    halves = (best_values.flatten(1) + ZERO).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4, best_steps.squeeze(-1).to(torch.int8), scale
