"""Arithmetic of PTX on NumPy arrays, where NumPy lacks an operation or rounds differently.

Types are named by a letter and their bytes: u4 is unsigned with 4 bytes (.b32 and .u32), s8 signed with 8, f2 half
precision. NumPy has no bfloat16: its 16 bits are kept as u2.
"""

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
s1, s2, s4, s8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
_SMALLEST_NORMAL = f4(2.0**-126)


# --- roundings ------------------------------------------------------------------------------------------------------


def bf16_to_f4(x):
    """float32 whose upper 16 bits are those of a bfloat16; exact."""
    return (x.astype(u4) << u4(16)).view(f4)


def f4_to_bf16(x):
    """Round to nearest, ties to even; NaN becomes the canonical NaN."""
    bits = np.ascontiguousarray(x).view(u4)
    rounded = ((bits + (u4(0x7FFF) + ((bits >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    return np.where(x != x, u2(0x7FFF), rounded)


def f8_to_bf16(x):
    """In one rounding where the result is a normal number, else through float32."""
    x = np.ascontiguousarray(x)
    bits = x.view(u8)
    kept = (bits + (u8(0xFFFFFFFFFFF) + ((bits >> u8(45)) & u8(1)))) & u8(0xFFFFE00000000000)
    normal = np.isfinite(x) & (np.abs(x) >= 2.0**-126)
    return f4_to_bf16(np.where(normal, kept.view(f8), x).astype(f4))


def f4_toward_zero(x8):
    """float64 to float32 toward zero."""
    y = x8.astype(f4)
    too_far = np.abs(y.astype(f8)) > np.abs(x8)
    return np.where(too_far, np.nextafter(y, f4(0)), y)


def f2_bits(x):
    """Round to half precision, and return its 16 bits."""
    return np.ascontiguousarray(x).astype(f2).view(u2)


def flush(x):
    """Subnormal float32 to zeros of their sign."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(f4(0), x), x)


def pack(low, high):
    """Two 16-bit numbers in one 32-bit word."""
    return low.astype(u4) | (high.astype(u4) << u4(16))


# --- float ----------------------------------------------------------------------------------------------------------


def fma4(a, b, c):
    """a * b + c: the product is exact in float64; the sum is rounded to 53 bits and then to 24, which differs from one
    rounding only where the first lands on a tie of the second."""
    return (a.astype(f8) * b + c).astype(f4)


def fma8(a, b, c):
    """a * b + c in float64 with the rounding errors of product and sum added back (almost always one rounding)."""
    product = a * b
    split = f8(134217729.0)
    a_high = a * split
    a_high = a_high - (a_high - a)
    a_low = a - a_high
    b_high = b * split
    b_high = b_high - (b_high - b)
    b_low = b - b_high
    product_error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    part = total - product
    sum_error = (product - (total - part)) + (c - part)
    result = total + (product_error + sum_error)
    return np.where(np.isfinite(result), result, product + c)


def both_halves(x, is_bf16):
    """The two 16-bit numbers in each 32-bit word, in float64."""
    low, high = x.astype(u2), (x >> u4(16)).astype(u2)
    if is_bf16:
        return bf16_to_f4(low).astype(f8), bf16_to_f4(high).astype(f8)
    return low.view(f2).astype(f8), high.view(f2).astype(f8)


def packed2(operation, is_bf16, *operands):
    """f16x2 and bf16x2: an operation on both halves of 32-bit words, in float64 and rounded once."""
    bits = f8_to_bf16 if is_bf16 else f2_bits
    low, high = zip(*(both_halves(x, is_bf16) for x in operands), strict=True)
    return pack(bits(operation(*low)), bits(operation(*high)))


def sum_of_halves(x, y):
    """s16x2: the sums of the halves of 32-bit words, without a carry from the lower to the upper one."""
    low, upper = u4(0xFFFF), u4(0xFFFF0000)
    return ((x + y) & low) | ((x & upper) + (y & upper))


def packed_f4(operation, *operands):
    """f32x2: an operation on both float32 in 64-bit words."""
    return operation(*(np.ascontiguousarray(x).view(f4) for x in operands)).view(u8)


def half1(operation, is_bf16, *operands):
    """f16 and bf16: an operation on 16-bit numbers, in float64 and rounded once."""
    values = [bf16_to_f4(x).astype(f8) if is_bf16 else x.view(f2).astype(f8) for x in operands]
    return (f8_to_bf16 if is_bf16 else f2_bits)(operation(*values))


def multiply_add(a, b, c):
    return a * b + c


def exp2(x):
    return np.exp2(x.astype(f8)).astype(f4)


def log2(x):
    return np.log2(x.astype(f8)).astype(f4)


def rsqrt(x):
    return (1.0 / np.sqrt(x.astype(f8))).astype(f4)


def tanh(x):
    return np.tanh(x.astype(f8)).astype(f4)


# --- integer --------------------------------------------------------------------------------------------------------


def div_trunc(a, b):
    """Toward zero; anything by zero is all ones, as on the chip by chance."""
    if a.dtype.itemsize == 4 if hasattr(a, "dtype") else False:
        q = np.trunc(a.astype(f8) / b).astype(s8).astype(np.result_type(a))
    else:
        q = a // b
        rest = a - q * b
        q = q + ((rest != 0) & ((a < 0) != (b < 0))).astype(q.dtype)
    return np.where(b == 0, np.array(-1).astype(q.dtype), q)


def rem_trunc(a, b):
    return a - div_trunc(a, b) * b


def mul_hi8(a, b, signed):
    """The upper 64 bits of a product of 64-bit numbers."""
    x, y = (
        np.asarray(a).view(u8) if hasattr(a, "view") else u8(a),
        np.asarray(b).astype(u8) if signed else np.asarray(b),
    )
    y = y.view(u8)
    mask = u8(0xFFFFFFFF)
    x0, x1, y0, y1 = x & mask, x >> u8(32), y & mask, y >> u8(32)
    carry = (x0 * y0) >> u8(32)
    middle = x1 * y0 + carry
    middle2 = x0 * y1 + (middle & mask)
    high = x1 * y1 + (middle >> u8(32)) + (middle2 >> u8(32))
    if not signed:
        return high
    high = high - np.where(x >> u8(63), y, u8(0)) - np.where(y >> u8(63), x, u8(0))
    return high.view(s8)


def shift_left(x, amount):
    bits = x.dtype.itemsize * 8
    return np.where(amount >= bits, x.dtype.type(0), x << np.minimum(amount, bits - 1).astype(x.dtype))


def shift_right(x, amount):
    """Arithmetic where x is signed."""
    bits = x.dtype.itemsize * 8
    clamped = np.minimum(amount, bits - 1).astype(x.dtype)
    shifted = x >> clamped
    return shifted if x.dtype.kind == "i" else np.where(amount >= bits, x.dtype.type(0), shifted)


def bit_field(x, position, length, signed):
    """bfe: length bits of x (unsigned) from a position on, extended by sign or zero."""
    bits = x.dtype.itemsize * 8
    wide = x.astype(u8)
    position, length = np.asarray(position).astype(u8) & u8(255), np.asarray(length).astype(u8) & u8(255)
    field = np.where(position >= bits, u8(0), wide >> np.minimum(position, u8(bits - 1)))
    length_shift = np.minimum(length, u8(63))
    result = np.where(length >= bits, field, field & ((u8(1) << length_shift) - u8(1)))
    if signed:
        # The sign is the field's last bit, or the word's where the field goes beyond it.
        last = np.minimum(position + length - np.minimum(length, u8(1)), u8(bits - 1))
        sign = ((wide >> last) & u8(1)).astype(bool) & (length != 0)
        end = np.minimum(position + length, u8(bits)) - np.minimum(position, u8(bits))
        fill = np.where(end >= 64, u8(0), ~u8(0) << np.minimum(end, u8(63)))
        result = np.where(sign, result | fill, result)
    return result.astype(x.dtype)


def bit_insert(a, b, position, length):
    """bfi: the lowest `length` bits of a in place of the bits of b from a position on."""
    position, length = np.asarray(position).astype(u8) & u8(255), np.asarray(length).astype(u8) & u8(255)
    mask = ((u8(1) << np.minimum(length, u8(63))) - u8(1)) << np.minimum(position, u8(63))
    wide = (b.astype(u8) & ~mask) | ((a.astype(u8) << np.minimum(position, u8(63))) & mask)
    return wide.astype(b.dtype)


def permute_bytes(a, b, selector):
    """prmt in its default mode: each byte of the result is a byte of a or b, or the sign of that byte eight times."""
    if np.ndim(selector) == 0 and not int(selector) & 0x8888:
        source = np.concatenate([np.ascontiguousarray(x).view(u1).reshape(-1, 4) for x in (a, b)], 1)
        return source.take([int(selector) >> 4 * i & 7 for i in range(4)], axis=1).view(u4).ravel()
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    selector = np.asarray(selector).astype(u4)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> u4(4 * i)) & u4(15)
        byte = ((both >> ((nibble & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        sign = np.where(byte & u4(128), u4(255), u4(0))
        result = result | (np.where(nibble & u4(8), sign, byte) << u4(8 * i))
    return result


def logic3(a, b, c, table):
    """lop3: any function of three bits; bit 4a + 2b + c of the table is its value."""
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return result


def count_ones(x):
    return np.bitwise_count(x).astype(u4)


def leading_zeros(x):
    """clz: the zeros above the highest bit that is set."""
    bits = x.dtype.itemsize * 8
    result = np.full(x.shape, bits, u4)
    for i in range(bits):
        result = np.where((x >> x.dtype.type(i)) & x.dtype.type(1), u4(bits - 1 - i), result)
    return result


def reverse_bits(x):
    """brev: the bits in the opposite order."""
    bits = x.dtype.itemsize * 8
    result = np.zeros_like(x)
    for i in range(bits):
        result |= ((x >> x.dtype.type(i)) & x.dtype.type(1)) << x.dtype.type(bits - 1 - i)
    return result


def funnel_shift(low, high, amount, left, wrap):
    """shf: a shift of the 64 bits high:low, of which the upper word (left) or the lower one (right) is returned."""
    amount = np.asarray(amount).astype(u8)
    amount = amount & u8(31) if wrap else np.minimum(amount, u8(32))
    both = low.astype(u8) | (high.astype(u8) << u8(32))
    return ((both << amount) >> u8(32)).astype(u4) if left else (both >> amount).astype(u4)


def to_integer(x, kind, rounding):
    """cvt from float: rounded, saturated, NaN to 0."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(f8))
    info = np.iinfo(kind)
    low, high = f8(info.min), f8(info.max)
    inside = np.clip(np.nan_to_num(rounded, nan=0.0, posinf=high, neginf=low), low, high)
    result = np.where(inside >= high, kind(info.max), inside.astype(kind)) if info.bits == 64 else inside.astype(kind)
    return result
