"""The activations of `reference.ACTIVATIONS` inside a kernel, each with its derivative.

tanh(u) = 2 sigmoid(2u) - 1 makes the tanh form of GELU x * sigmoid(2u), and SiLU x * sigmoid(x), without libdevice.
"""

# pyright: reportGeneralTypeIssues=false
# By the declarations of triton 3.7 some jit functions return nothing.

import triton
import triton.language as tl

from .arithmetic import LOG2_E

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)
# Times a sigmoid that has underflowed to zero, the exponential would give NaN if it were infinite.
_LARGEST_EXPONENTIAL = tl.constexpr(2.0**120)


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and 1 - sigmoid(x), each with a small relative error, and finite wherever x is a number."""
    exponential = tl.exp2(x * -LOG2_E)
    # The square of an inverse square root takes fewer instructions than a division.
    root = tl.rsqrt(exponential + 1.0)
    gate = root * root
    return gate, tl.minimum(exponential, _LARGEST_EXPONENTIAL) * gate


@triton.jit
def activation_and_derivative(x, ACTIVATION: tl.constexpr):
    """Both in x's dtype, float32 or float64. What is not used is not computed."""
    # The tensor stands left of a constant: the other way round, the interpreter makes a constant of both.
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        gate = tl.erf(x * _SQRT_HALF) * 0.5 + 0.5
        density = tl.exp2(x * x * (-0.5 * LOG2_E)) * _INVERSE_SQRT_2_PI
        return x * gate, gate + x * density
    elif ACTIVATION == "silu":
        gate, complement = _sigmoid(x)
        return x * gate, gate + x * (gate * complement)
    else:
        tl.static_assert(ACTIVATION == "gelu_new" or ACTIVATION == "gelu_fast")
        gate, complement = _sigmoid(x * (x * x * _CUBIC + 1.0) * _TWO_SQRT_2_OVER_PI)
        slope = (x * x * (3.0 * _CUBIC) + 1.0) * _TWO_SQRT_2_OVER_PI
        # From the left: where slope or x is large, the product of gate and complement is zero first.
        return x * gate, gate + gate * complement * x * slope
