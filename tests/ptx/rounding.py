"""Floating point with one rounding, in numpy: sums in float64 rounded to odd, then to the type that is wanted.

Round to odd keeps in the last bit whether anything was cut off, so that a second rounding to at most 51 bits is as if
there had been no first one (Boldo and Melquiond 2008). The product of two float32 is exact in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]


def sum_to_odd(a: F64, b: F64) -> F64:
    """a + b, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    inexact = (error != 0) & np.isfinite(total)
    if not inexact.any():
        return total
    even = inexact & ((total.view(np.uint64) & np.uint64(1)) == 0)
    return np.where(even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def to_f32(exact: F64, mode: str = "rn") -> F32:
    """float64 (rounded to odd, or exact) to float32 by one of rn, rz, rm, rp."""
    near = exact.astype(np.float32)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    wrong = {"rz": np.abs(back) > np.abs(exact), "rm": back > exact, "rp": back < exact}[mode]
    toward = np.float32({"rz": 0, "rm": -np.inf, "rp": np.inf}[mode])
    return np.where(wrong, np.nextafter(near, toward), near)


def add_f32(a: F32, b: F32, mode: str = "rn") -> F32:
    """a + b with one rounding; an exact zero of two signs is -0 only when rounding down."""
    if mode == "rn":
        return a + b
    total = to_f32(sum_to_odd(a.astype(np.float64), b.astype(np.float64)), mode)
    return _negative_zero(total, a, b) if mode == "rm" else total


def mul_f32(a: F32, b: F32, mode: str = "rn") -> F32:
    return a * b if mode == "rn" else to_f32(a.astype(np.float64) * b.astype(np.float64), mode)


def fma_f32(a: F32, b: F32, c: F32, mode: str = "rn") -> F32:
    """a * b + c with one rounding."""
    product = a.astype(np.float64) * b.astype(np.float64)
    total = to_f32(sum_to_odd(product, c.astype(np.float64)), mode)
    return _negative_zero(total, product, c) if mode == "rm" else total


def _negative_zero(total: F32, a: NDArray, b: NDArray) -> F32:
    cancels = (total == 0) & ((a != 0) | (np.signbit(a) != np.signbit(b)))
    return np.where(cancels, np.float32(-0.0), total)


def to_f16(exact: F64, mode: str = "rn") -> NDArray[np.float16]:
    """float64 (rounded to odd, or exact) to float16 by rn or rz."""
    near = exact.astype(np.float16)
    if mode == "rn":
        return near
    return np.where(np.abs(near.astype(np.float64)) > np.abs(exact), np.nextafter(near, np.float16(0)), near)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(exact: F64, mode: str = "rn") -> NDArray[np.uint16]:
    """float64 (rounded to odd, or exact) to the bits of a bfloat16 by rn or rz; NaN is 0x7fff."""
    cut = to_f32(exact, "rz")
    bits = cut.view(np.uint32).copy()
    bits |= (cut.astype(np.float64) != exact).astype(np.uint32)  # to odd again
    if mode == "rn":
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(exact), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def flush(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    tiny = np.abs(values) < np.finfo(values.dtype).smallest_normal
    return np.where(tiny, np.copysign(values.dtype.type(0), values), values)
