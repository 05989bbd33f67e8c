"""bfloat16, tf32 and the order of float32 sums in the interpreter.

The interpreter stores bfloat16 as bit patterns and computes on the patterns. Here every operation converts them to
float32, computes, and rounds the result to the nearest, ties to even. The interpreter leaves matrix products to NumPy,
whose order of addition depends on the tile's shape and the processor. Here they are a chain of multiply-adds, as on a
GPU, so that two tiles compute the same score. For an inner axis too short for a GPU, they raise as its compiler does.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

# The shortest inner axis of a product that triton compiles for NVIDIA's GPUs, in 16 bits and more.
SHORTEST_INNER_AXIS = 16
ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_dot", "create_clampf", "create_rsqrt", "create_erf")


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: np.ndarray) -> np.ndarray:
    """Floating values as the bit patterns (uint16) of the nearest bfloat16, ties to even."""
    values = np.array(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_float32(handle.data), tl.float32)


def _in_float32(operation: Callable) -> Callable:
    """`operation` of the builder on float32 values; the result is bfloat16 if every operand is."""

    def on_values(builder: InterpreterBuilder, *args: Any) -> TensorHandle:
        operands = [arg for arg in args if isinstance(arg, TensorHandle)]
        if not any(_is_bfloat16(operand) for operand in operands):
            return operation(builder, *args)
        result = operation(builder, *(_widened(arg) if _is_bfloat16(arg) else arg for arg in args))
        if result.data.dtype == np.bool_ or not all(_is_bfloat16(operand) for operand in operands):
            return result
        return TensorHandle(to_bits(result.data), tl.bfloat16)

    return on_values


def multiply_add(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a @ b in float32, each element as a chain of fused multiply-adds."""
    left, right = a.astype(np.float64), b.astype(np.float64)  # products of float32 are exact in float64
    for inner in range(a.shape[-1]):
        total = (left[..., inner, None] * right[..., inner, None, :] + total).astype(np.float32)
    return total


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """Round float32 to 10 bits of mantissa, to nearest, ties to even; infinities and NaN are unchanged."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x0FFF) + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).view(np.float32)


def repair() -> None:
    """Repair the interpreter for the rest of the process."""
    cast, convert, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot
    reduce = ReduceOps.apply_impl
    round_to_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def cast_values(builder: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if source.dtype.scalar == dtype.scalar:
            return cast(builder, source, dtype)
        if _is_bfloat16(source):
            source = _widened(source)
        if dtype.scalar == tl.bfloat16:
            return TensorHandle(to_bits(source.data), tl.bfloat16)
        return cast(builder, source, dtype)

    def convert_values(
        builder: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype, rounding: Any
    ) -> TensorHandle:
        if dtype.scalar == tl.bfloat16 and rounding != round_to_zero:
            return cast_values(builder, source, dtype)
        return convert(builder, source, dtype, rounding)

    def dot_in_order(
        builder: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        accumulator: TensorHandle,
        precision: Any,
        max_imprecise: int,
    ) -> TensorHandle:
        if a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(round_to_tf32(operand.data), tl.float32) for operand in (a, b))
        if a.dtype.scalar == b.dtype.scalar == tl.float32 and accumulator.dtype.scalar == tl.float32:
            return TensorHandle(multiply_add(a.data, b.data, accumulator.data), tl.float32)
        return dot(builder, a, b, accumulator, precision, max_imprecise)

    def reduce_values(operation: ReduceOps, inputs: tuple[tl.tensor, ...]) -> Any:
        if inputs[0].dtype != tl.bfloat16:
            return reduce(operation, inputs)
        widened = operation.to_tensor(to_float32(inputs[0].handle.data), tl.float32)
        results = reduce(operation, (widened, *inputs[1:]))
        results = results if isinstance(results, tuple | list) else (results,)
        return tuple(
            operation.to_tensor(to_bits(result.handle.data), tl.bfloat16) if result.dtype == tl.float32 else result
            for result in results
        )

    mock.patch.multiple(
        InterpreterBuilder, cast_impl=cast_values, create_fp_to_fp=convert_values, create_dot=dot_in_order
    ).start()
    for name in ARITHMETIC:
        mock.patch.object(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name))).start()
    mock.patch.object(ReduceOps, "apply_impl", reduce_values).start()
    limits = {"min_dot_size": lambda left, right: (1, 1, SHORTEST_INNER_AXIS)}
    mock.patch.dict(interpreter.interpreter_builder.codegen_fns, limits).start()
