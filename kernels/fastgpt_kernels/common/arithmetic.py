"""Constants, and arithmetic whose rounding must not be left to the compiler."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rounded_product(a, b):
    """a * b for a `tl.sum`, rounded before its first addition.

    The compiler may fuse a plain product into an addition. If a thread holds one element of a sum, that addition is the
    first exchange between lanes, fma(a, b, other lane's product): each of two lanes rounds only the other's product,
    and their sums differ.
    """
    return tl.fma(a, b, 0.0)
