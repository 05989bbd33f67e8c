"""Products of few rows and an int8 matrix as sums of the matrix' rows, each times an input: torch's embedding bag.

FBGEMM, which adds bags on x86, multiplies bytes by float32 numbers, so that rows need not be written in digits first,
and reads them for a single row at up to twice the rate of oneDNN's products of bytes.

r rows, K inputs, N outputs, S slices.
"""

import functools

import torch
from fastgpt_kernels.common.int8 import Int8Matrix
from torch import Tensor

# What an unsigned byte holds for the value 0.
_ZERO = 128
# Behind each row of bytes stand two float32 numbers: a byte b means the first times b, plus the second.
_SCALE_AND_OFFSET = torch.tensor([1, -_ZERO], dtype=torch.float32, device="cpu").view(torch.uint8)
# The inputs of a slice. Sums of 32 err about as much as torch's product; those of 64 err more and are no faster.
_BAG = 32


class Bags:
    """An int8 matrix as a copy in the layout of torch's quantised embeddings.

    A bag is one row of x and one slice of the inputs. Cores share the bags, and the slices' sums are added afterwards.
    """

    def __init__(self, matrix: Int8Matrix):
        n_inputs, n_outputs = matrix.shape
        self.scale = matrix.scale
        self.matrix = torch.empty(n_inputs, n_outputs + len(_SCALE_AND_OFFSET), dtype=torch.uint8, device="cpu")
        self.matrix[:, :n_outputs].copy_(matrix.values.t().view(torch.uint8)).bitwise_xor_(_ZERO)
        self.matrix[:, n_outputs:] = _SCALE_AND_OFFSET
        self.n_bytes = self.matrix.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ matrix + bias. x: (r, K), contiguous. bias: (N,). Returns (r, N)."""
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.matrix, *_bags(*x.shape), per_sample_weights=_by_slice(x.float())
        )
        product = sums.unflatten(0, (-1, len(x))).sum(0)
        product = product.mul_(self.scale) if bias is None else torch.addcmul(bias.float(), product, self.scale)
        return product.to(x.dtype)


@functools.cache
def _bags(n_rows: int, n_inputs: int) -> tuple[Tensor, Tensor]:
    """(K * r,), the rows of the matrix in each bag, by slice, then by row of x; (S * r,), where each bag starts."""
    slices = torch.arange(n_inputs, dtype=torch.int32, device="cpu").split(_BAG)
    bags = [inputs for inputs in slices for _ in range(n_rows)]
    lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int32, device="cpu")
    return torch.cat(bags), lengths.cumsum(0, dtype=torch.int32) - lengths


def _by_slice(x: Tensor) -> Tensor:
    """(r, K) as (K * r,): the first slice of all rows, then the next."""
    return x.flatten() if len(x) == 1 else torch.cat([part.flatten() for part in x.split(_BAG, 1)])


@functools.cache
def adds_bytes() -> bool:
    """Whether this torch has bags of bytes."""
    values = torch.arange(-8, 8, dtype=torch.int8, device="cpu").view(4, 4)
    matrix = Int8Matrix(values, torch.ones(4, dtype=torch.float32, device="cpu"))
    try:
        sums = Bags(matrix)(matrix.scale[None], None)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(sums, values.sum(1, dtype=torch.float32)[None])
