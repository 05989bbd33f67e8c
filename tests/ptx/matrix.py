"""Matrix products of one warp and of four: the layout of the elements in a fragment, and the sums.

A fragment is what the registers of a warp hold of a matrix: each of its 32 lanes has a few elements, at places that the
PTX manual draws for every shape. Here one gather turns a fragment into the matrix, whose product is an ordinary one.
Products are exact and are summed in float64, then rounded once to the accumulator's type. A chip rounds (or truncates)
after every few products, in an unspecified order.
"""

import re
from functools import cache

import numpy as np

from . import numeric

_PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "f64": 1}


def sizes(shape: str) -> tuple[int, int, int]:
    """m16n8k16 -> 16, 8, 16"""
    return tuple(int(n) for n in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())  # type: ignore[return-value]


def values(registers: np.ndarray, dtype: str) -> np.ndarray:
    """float64 elements of registers (..., words): (..., words, elements of a word)."""
    if dtype == "f64":
        return registers[..., None]
    if dtype == "tf32":  # The lower 13 bits of a float32 are not read.
        return (registers & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    return halves(np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2), dtype)


def halves(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float64 of 16-bit numbers."""
    if dtype == "bf16":
        return numeric.bf16_to_f4(bits).astype(np.float64)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float64)


@cache
def _operand_places(rows: int, k: int, per_register: int) -> np.ndarray:
    """(registers, 32, elements of one) -> row * k + column, of a matrix whose rows a group of 4 lanes shares."""
    lane = np.arange(32)
    group, within = lane >> 2, lane & 3
    places = []
    for column in range(0, k, 4 * per_register):
        for row in range(0, rows, 8):
            columns = column + within[:, None] * per_register + np.arange(per_register)
            places.append((row + group)[:, None] * k + columns)
    return np.stack(places)


@cache
def _operand_order(rows: int, k: int, per_register: int) -> np.ndarray:
    """For each element of the matrix, its position among those of the fragment."""
    places = _operand_places(rows, k, per_register).ravel()
    order = np.empty(places.size, np.int64)
    order[places] = np.arange(places.size)
    return order


@cache
def _result_places(m: int, n: int) -> np.ndarray:
    """(registers, 32) -> row * n + column of the element in that register of that lane."""
    lane = np.arange(32)
    group, within = lane >> 2, lane & 3
    places = []
    for row in range(0, m, 8):
        for one in range(2):
            places.append((row + group) * n + within * 2 + one)
    return np.stack(places)


def _matrix(registers: tuple, dtype: str, rows: int, k: int) -> np.ndarray:
    """A fragment as a matrix for each warp, (warps, rows, k) in float64. registers: each (lanes,)."""
    per = _PER_REGISTER[dtype]
    stacked = np.stack([r.reshape(-1, 32) for r in registers], 1)  # (warps, registers, 32)
    flat = values(stacked, dtype).reshape(stacked.shape[0], -1)
    return flat[:, _operand_order(rows, k, per)].reshape(-1, rows, k)


def multiply(shape: tuple, dtype: str, result_dtype: str, a: tuple, b: tuple, c: tuple) -> list:
    """mma.sync of all warps: the registers of a @ b + c. shape: (m, n, k). a, b, c: registers, each (lanes,)."""
    m, n, k = shape
    per = _PER_REGISTER.get(dtype)
    if per is None or len(a) * 32 * per != m * k or len(b) * 32 * per != n * k or n != 8:
        raise ValueError(f"no such matrix product: {shape} {dtype}")
    left, right = _matrix(a, dtype, m, k), _matrix(b, dtype, n, k)
    product = left @ right.swapaxes(1, 2)
    places = _result_places(m, n)
    parts = product.reshape(-1, m * n)[:, places]  # (warps, registers, 32)
    if result_dtype == "f16":  # two in a register
        added = []
        for i, word in enumerate(c):
            sums = np.stack([parts[:, 2 * i], parts[:, 2 * i + 1]], -1) + values(word.reshape(-1, 32), "f16")
            added.append(np.ascontiguousarray(sums.astype(np.float16)).view(np.uint32).ravel())
        return added
    kind = {"f32": np.float32, "f64": np.float64}[result_dtype]
    return [(parts[:, i].ravel() + c[i]).astype(kind) for i in range(len(c))]
