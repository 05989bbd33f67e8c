"""float32 products by oneDNN on a CPU, over the weights as they lie, without derivatives.

torch gives products in float32 to another library (MKL or OpenBLAS), which is slower on many processors, above all
where the rows are few; products in half precision it gives to oneDNN itself. oneDNN also adds the bias and applies the
activation while its result is in the cache.

r rows, K inputs, N outputs.
"""

import functools
import time
from collections.abc import Callable

import torch
from fastgpt_kernels import reference
from fastgpt_kernels.operations.gelu_mlp.reference import check_mlp_arguments
from torch import Tensor

# oneDNN's name and algorithm of the activations that it computes.
_ALGORITHMS = {
    None: ("none", ""),
    "gelu_new": ("gelu", "tanh"),
    "gelu_fast": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
}
# Smaller matrices are bound by Python, whatever multiplies them.
_MIN_BYTES = 2**20
# oneDNN must gain this much, because a gain within the noise would change bits for nothing.
_MIN_GAIN = 1.1


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(x @ matrix + bias). x: (r, K). matrix: (K, N). bias: (N,). Returns (r, N)."""
    name, algorithm = _ALGORITHMS[activation]
    return torch.ops.mkldnn._linear_pointwise(x, matrix.t(), bias, name, [], algorithm)


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    activation: str = "gelu_new",
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """See `fastgpt_kernels.reference.gelu_mlp`."""
    check_mlp_arguments(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, residual, dropout_p=0.0)
    rows = x.reshape(-1, x.shape[-1])
    hidden = multiply(rows, fc_weight, fc_bias, activation)  # (N, F)
    out = multiply(hidden, proj_weight, proj_bias).view(*x.shape[:-1], proj_weight.shape[1])
    return out if residual is None else residual + out


# --- the choice -----------------------------------------------------------------------------------------------------


def gains_in_mlp(x: Tensor, fc_weight: Tensor, activation: str) -> bool:
    """Whether `gelu_mlp` is faster here than the reference for float32 rows x, (..., C), on a CPU."""
    if activation not in _ALGORITHMS or fc_weight.nbytes < _MIN_BYTES or x.numel() == 0:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    n_rows = x.numel() // x.shape[-1]
    # The ratio hardly changes from 64 rows on, and is timed for powers of two below.
    n_timed = 1 << min(6, (n_rows - 1).bit_length())
    return _gain(n_timed, *fc_weight.shape, activation, torch.get_num_threads()) > _MIN_GAIN


@functools.cache
def _gain(n_rows: int, n_inputs: int, n_hidden: int, activation: str, n_threads: int) -> float:
    """Time of the reference over oneDNN's for an MLP of this shape, timed once a process in tens of milliseconds."""
    fc, proj = torch.rand(n_inputs, n_hidden), torch.rand(n_hidden, n_inputs)
    arguments = torch.rand(n_rows, n_inputs), fc, fc.new_zeros(n_hidden), proj, proj.new_zeros(n_inputs), activation
    seconds: dict[Callable, list[float]] = {reference.gelu_mlp: [], gelu_mlp: []}
    for _ in range(5):
        for mlp, taken in seconds.items():
            start = time.perf_counter()
            mlp(*arguments)
            taken.append(time.perf_counter() - start)
    return min(seconds[reference.gelu_mlp]) / min(seconds[gelu_mlp])
