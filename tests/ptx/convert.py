"""Conversions (PTX ISA: Data Movement and Conversion Instructions: cvt, cvt.pack).

Sources are the bits of registers that may be wider than the type, as the machine hands them over.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx import rounding
from tests.ptx.floating import clamp, decode, encode
from tests.ptx.plans import FLOATS, Mods, Plan, operation
from tests.ptx.scalars import DTYPES, INTEGERS, WIDTHS, Array

TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip
MODES = ("rn", "rz", "rm", "rp")


def _to_integer(values: Array, kind: str, whole: Callable[[Array], Array], source: str) -> Array:
    """Clamped to the type; NaN is 0, but for 64 bits on either side 1 << 63 (or half the range, unsigned)."""
    dtype = DTYPES[kind]
    limits = np.iinfo(dtype)
    rounded = whole(values.astype(np.float64))
    top = float(limits.max) + 1 if dtype.itemsize == 8 else float(limits.max)  # 2^63 and 2^64 are float64, less 1 not
    inside = (rounded >= limits.min) & ((rounded < top) | (rounded == limits.max))
    result = np.where(inside, rounded, 0).astype(dtype)
    result = np.where(rounded >= top, dtype.type(limits.max), result)
    result = np.where(rounded <= limits.min, dtype.type(limits.min), result)
    nan = 1 << 8 * dtype.itemsize - 1 if source == "f64" or dtype.itemsize == 8 else 0
    return np.where(np.isnan(values), np.array(nan, np.uint64).astype(dtype), result)


def _between_integers(values: Array, kind: str, saturates: bool) -> Array:
    dtype = DTYPES[kind]
    if not saturates:
        return values.astype(dtype)
    limits, has = np.iinfo(dtype), np.iinfo(values.dtype)
    return np.clip(values, max(limits.min, has.min), min(limits.max, has.max)).astype(dtype)


def _rounding_fits(to: str, source: str, whole: str, mode: str) -> bool:
    """Whether this conversion takes a rounding to integers (`whole`) or one to a narrower float (`mode`)."""
    is_float, was_float = to in FLOATS, source in FLOATS
    if not is_float:
        return bool(whole) == was_float and not mode
    if not was_float:
        return bool(mode) and not whole
    if to == source:
        return not mode
    return not whole and WIDTHS[to] != WIDTHS[source] and bool(mode) == (WIDTHS[to] < WIDTHS[source])


@operation("cvt")
def _cvt(m: Mods) -> Plan:
    if m.flag("pack"):
        return _pack(m)
    whole = m.one_of(*TO_INTEGER, default="")
    mode = m.one_of(*MODES, default="")
    flushes, saturates, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    to, source = m.kind(*INTEGERS, *FLOATS), m.kind(*INTEGERS, *FLOATS)
    if to.endswith("x2"):
        return _pair(m, to, source, mode, flushes or saturates, relu)
    is_float, was_float = to in FLOATS, source in FLOATS
    if relu or source.endswith("x2") or not _rounding_fits(to, source, whole, mode):
        m.unknown()
    if is_float and not was_float and WIDTHS[source] == 8 and (to not in ("f32", "f64") or mode != "rn"):
        m.unknown()  # not exact in float64

    def compute(values: Array) -> Array:
        if was_float:
            values = decode(values, source)
            values = rounding.flush(values) if flushes and values.dtype == np.float32 else values
        if not is_float:
            if was_float:
                return _to_integer(values, to, TO_INTEGER[whole], source)
            return _between_integers(values, to, saturates)
        if not was_float:
            exact_here = to in ("f32", "f64") and mode == "rn"
            return values.astype(DTYPES[to]) if exact_here else encode(values.astype(np.float64), to, mode)
        if whole:
            values = TO_INTEGER[whole](values)
        result = encode(values.astype(np.float64), to, mode or "rn")
        if to == "f32" and flushes:
            result = rounding.flush(result)
        return encode(clamp(decode(result, to)).astype(np.float64), to) if saturates else result

    return Plan((to,), (source,), compute)


def _pair(m: Mods, to: str, source: str, mode: str, more: bool, relu: bool) -> Plan:
    """Two float32 as the upper and the lower half."""
    if source != "f32" or mode not in ("rn", "rz") or more:
        m.unknown()

    def compute(upper: Array, lower: Array) -> Array:
        exact = np.stack([lower, upper], 1).ravel().astype(np.float64)
        return encode(np.where(exact < 0, 0.0, exact) if relu else exact, to, mode)

    return Plan((to,), (source, source), compute)


def _pack(m: Mods) -> Plan:
    """Two integers, saturated, below (for 8 bits and less) what a third one has in its low bits."""
    if not m.flag("sat"):
        m.unknown()
    kind = m.kind("s2", "u2", "s4", "u4", "s8", "u8", "s16", "u16")
    m.kind("s32")
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    with_third = bits < 16 and m.kind("b32") == "b32"

    def compute(a: Array, b: Array, *third: Array) -> Array:
        first, second = (np.clip(x, low, high).view(np.uint32) & np.uint32((1 << bits) - 1) for x in (a, b))
        packed = first << np.uint32(bits) | second
        return packed | third[0] << np.uint32(2 * bits) if third else packed

    return Plan(("b32",), ("s32", "s32", *(["b32"] if with_third else [])), compute)
