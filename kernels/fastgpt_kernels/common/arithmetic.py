"""Arithmetic that is said exactly, where the compiler would otherwise choose."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rounded_product(a, b):
    """a * b to be summed by `tl.sum`, rounded before its first addition.

    The compiler may fuse a plain product into an addition. Where a thread holds one element of a sum, that is the first
    exchange between lanes, fma(a, b, other lane's product): each of two lanes then rounds the other's product and not
    its own, and their sums differ.
    """
    return tl.fma(a, b, 0.0)
