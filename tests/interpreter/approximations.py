"""Special functions that err as those of a GPU may, for `pytest --approximate`.

NumPy rounds them correctly, or nearly. CUDA's programming guide states the largest errors of its float32 functions in
ulps. Here a result moves by up to that many, by a number that depends on its bits alone, so that the same inputs keep
giving the same bits.
"""

from collections.abc import Callable
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Functions of the interpreter's builder. A division is one by `div.full`; `tl.div_rn` and `tl.sqrt_rn` are exact.
ULPS = {
    "create_exp": 2,
    "create_exp2": 2,
    "create_log": 1,
    "create_log2": 1,
    "create_rsqrt": 2,
    "create_sqrt": 1,
    "create_erf": 2,
    "create_fdiv": 2,
}


def moved(values: np.ndarray, n_ulps: int) -> np.ndarray:
    """float32 values, each at most n_ulps away; zeros, infinities, NaN and subnormal numbers stay as they are.

    So do powers of two, because a GPU gives exp2 of integers and the inverses of powers of two exactly.
    """
    bits = np.array(values, dtype=np.float32).view(np.int32)
    noise = (bits.astype(np.int64) * 2654435761 >> 13) % (2 * n_ulps + 1) - n_ulps
    is_moved = np.isfinite(values) & (np.abs(values) > np.finfo(np.float32).tiny * 2) & (bits & 0x7FFFFF != 0)
    return np.where(is_moved, bits + noise.astype(np.int32), bits).view(np.float32)


def _approximate(function: Callable, n_ulps: int) -> Callable:
    def approximated(builder: InterpreterBuilder, *operands: TensorHandle) -> TensorHandle:
        result = function(builder, *operands)
        if result.dtype.scalar != tl.float32:
            return result
        divides_exactly = len(operands) == 2 and not np.any(operands[1].data.view(np.int32) & 0x7FFFFF)
        return result if divides_exactly else TensorHandle(moved(result.data, n_ulps), result.dtype)

    return approximated


def apply() -> None:
    """For the rest of the process."""
    for name, n_ulps in ULPS.items():
        mock.patch.object(InterpreterBuilder, name, _approximate(getattr(InterpreterBuilder, name), n_ulps)).start()
