"""Arithmetic inside kernels: sums whose rounding must not be left to the compiler, and the activations.

With tanh(u) = 2 sigmoid(2u) - 1 the tanh form of GELU is x * sigmoid(z), z = 2u, which needs no libdevice.
"""

# pyright: reportGeneralTypeIssues=false
# Triton 3.7 declares that some jit functions return None.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# z = _LINEAR x + _CUBIC x^3: 2 sqrt(2 / pi), and 0.044715 times that.
_LINEAR = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715 * 1.5957691216057308)
# An infinite exponential times a sigmoid that has underflowed to zero would be NaN.
_LARGEST_EXPONENTIAL = tl.constexpr(2.0**120)


@triton.jit
def rounded_product(a, b):
    """a * b for a `tl.sum`, rounded before its first addition.

    The compiler may fuse a plain product into an addition. If a thread holds one element of a sum, that addition is the
    first exchange between lanes, fma(a, b, other lane's product): each of two lanes rounds only the other's product,
    and their sums differ.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def _sigmoid(exponent):
    """sigmoid(x) and 1 - sigmoid(x) of x = -exponent / log2(e), with small relative errors, finite unless x is NaN."""
    exponential = tl.exp2(exponent)
    # The square of an inverse square root takes fewer instructions than a division.
    root = tl.rsqrt(exponential + 1.0)
    gate = root * root
    return gate, tl.minimum(exponential, _LARGEST_EXPONENTIAL) * gate


@triton.jit
def activation_and_derivative(x, ACTIVATION: tl.constexpr):
    """One of `activations.ACTIVATIONS`, and its derivative, in x's dtype, float32 or float64.

    The compiler drops the one that is not used.
    """
    # Tensors stand left of constants: the other way round, the interpreter makes a constant of both.
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        gate = tl.erf(x * _SQRT_HALF) * 0.5 + 0.5
        density = tl.exp2(x * x * (-0.5 * LOG2_E)) * _INVERSE_SQRT_2_PI
        return x * gate, gate + x * density
    elif ACTIVATION == "silu":
        gate, complement = _sigmoid(x * -LOG2_E)
        return x * gate, gate + x * (gate * complement)
    else:
        tl.static_assert(ACTIVATION == "gelu_new" or ACTIVATION == "gelu_fast")
        # Products of constants cost nothing: triton multiplies them.
        gate, complement = _sigmoid(x * (x * x * (-LOG2_E * _CUBIC) + -LOG2_E * _LINEAR))
        slope = x * x * (3.0 * _CUBIC) + _LINEAR
        # Multiply from the left: where slope or x is large, gate * complement is already zero.
        return x * gate, gate + gate * complement * x * slope
