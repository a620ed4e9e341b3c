"""Floating point (PTX ISA: Floating Point, Half Precision Floating Point Instructions).

Arithmetic with a rounding is exact. The .approx functions are evaluated in float64 and rounded once, which is within
what the ISA allows, but a device may differ from it by the few ulp that the ISA gives for each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx import rounding
from tests.ptx.plans import Mods, Plan, operation
from tests.ptx.scalars import DTYPES, UNSIGNED, Array

HALVES = ("f16", "f16x2", "bf16", "bf16x2")
NAN = {
    np.dtype(np.float16): np.uint16(0x7FFF).view(np.float16),
    np.dtype(np.float32): np.uint32(0x7FFFFFFF).view(np.float32),
    np.dtype(np.float64): np.uint64(0x7FFFFFFFFFFFFFFF).view(np.float64),
}
Compute = Callable[..., Array]


def decode(values: Array, kind: str) -> Array:
    """Values that numpy can count with: bfloat16 as float32."""
    return rounding.from_bf16(values) if kind.startswith("bf16") else values


def encode(exact: Array, kind: str, mode: str = "rn") -> Array:
    """float64 rounded to the type."""
    if kind.startswith("bf16"):
        return rounding.to_bf16(exact, mode)
    if kind.startswith("f16"):
        return canonical(rounding.to_f16(exact, mode))
    return canonical(rounding.to_f32(exact, mode) if kind == "f32" else exact)


def canonical(values: Array) -> Array:
    """All NaN as the one that devices make."""
    wrong = np.isnan(values)
    return np.where(wrong, NAN[values.dtype], values) if wrong.any() else values


def clamp(values: Array) -> Array:
    """To [0, 1], NaN to 0 (.sat)."""
    return np.where(values > 0, np.minimum(values, values.dtype.type(1)), values.dtype.type(0))


EXACT: dict[str, Compute] = {  # in float64, rounded to odd
    "add": lambda a, b: rounding.sum_to_odd(a, b),
    "sub": lambda a, b: rounding.sum_to_odd(a, -b),
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: rounding.sum_to_odd(a * b, c),
}
SINGLE: dict[str, Callable[..., Array]] = {
    "add": rounding.add_f32,
    "sub": lambda a, b, mode: rounding.add_f32(a, -b, mode),
    "mul": rounding.mul_f32,
    "fma": rounding.fma_f32,
}
DOUBLE: dict[str, Compute] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@operation("add", "sub", "mul", "fma", "mad", floats=True)
def _arithmetic(m: Mods) -> Plan:
    name = "fma" if m.name == "mad" else m.name
    mode = m.one_of("rn", "rz", "rm", "rp", default="rn")
    flushes, saturates, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    kind = m.kind("f32", *HALVES, *(["f64"] if name in DOUBLE else []))
    if mode != "rn" and kind != "f32":
        m.unknown()

    def compute(*sources: Array) -> Array:
        values = [decode(each, kind) for each in sources]
        if flushes:
            values = [rounding.flush(each) for each in values]
        if kind == "f32":
            result = canonical(SINGLE[name](*values, mode))
        elif kind == "f64":
            result = canonical(DOUBLE[name](*values))
        else:
            result = decode(encode(EXACT[name](*(each.astype(np.float64) for each in values)), kind), kind)
        if flushes:
            result = rounding.flush(result)
        if saturates:
            result = clamp(result)
        if relu:
            result = np.where(result < 0, result.dtype.type(0), result)
        return encode(result.astype(np.float64), kind) if kind in HALVES else result

    return Plan((kind,), (kind,) * (3 if name == "fma" else 2), compute)


@operation("neg", "abs", floats=True)
def _sign(m: Mods) -> Plan:
    flushes, kind = m.flag("ftz"), m.kind("f32", "f64", *HALVES)
    bits = UNSIGNED[DTYPES[kind].itemsize]
    sign = bits.type(1 << 8 * bits.itemsize - 1)

    def compute(a: Array) -> Array:
        a = rounding.flush(a) if flushes else a
        return (a.view(bits) ^ sign if m.name == "neg" else a.view(bits) & ~sign).view(a.dtype)

    return Plan((kind,), (kind,), compute)


@operation("copysign", floats=True)
def _copysign(m: Mods) -> Plan:
    kind = m.kind("f32", "f64")
    return Plan((kind,), (kind, kind), lambda a, b: np.copysign(b, a))


@operation("min", "max", floats=True)
def _extremum(m: Mods) -> Plan:
    flushes, keeps_nan, kind = m.flag("ftz"), m.flag("NaN"), m.kind("f32", "f64", *HALVES)
    largest = m.name == "max"
    choose = {(True, True): np.maximum, (True, False): np.fmax, (False, True): np.minimum, (False, False): np.fmin}

    def compute(a: Array, b: Array) -> Array:
        a, b = decode(a, kind), decode(b, kind)
        if flushes:
            a, b = rounding.flush(a), rounding.flush(b)
        result = canonical(choose[largest, keeps_nan](a, b))
        zeros = (a == 0) & (b == 0)
        if zeros.any():  # -0 is less than +0
            negative = np.signbit(a) & np.signbit(b) if largest else np.signbit(a) | np.signbit(b)
            result = np.where(zeros, np.where(negative, result.dtype.type(-0.0), result.dtype.type(0)), result)
        return encode(result.astype(np.float64), kind) if kind.startswith("bf16") else result

    return Plan((kind,), (kind, kind), compute)


@operation("div", floats=True)
def _divide(m: Mods) -> Plan:
    m.one_of("rn", "approx", "full")
    flushes, kind = m.flag("ftz"), m.kind("f32", "f64")

    def compute(a: Array, b: Array) -> Array:
        if flushes:
            return rounding.flush(canonical(rounding.flush(a) / rounding.flush(b)))
        return canonical(a / b)

    return Plan((kind,), (kind, kind), compute)


FUNCTIONS: dict[str, Compute] = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@operation(*FUNCTIONS, floats=True)
def _function(m: Mods) -> Plan:
    """The square root and the reciprocal in float64 round to float32 as their exact values do, so .rn is exact."""
    m.one_of("approx", *(["rn"] if m.name in ("rcp", "sqrt") else []))
    flushes = m.flag("ftz")
    kind = m.kind("f32", *(HALVES if m.name in ("ex2", "tanh") else []))

    def compute(a: Array) -> Array:
        values = decode(a, kind)
        values = rounding.flush(values) if flushes else values
        result = encode(FUNCTIONS[m.name](values.astype(np.float64)), kind)
        return rounding.flush(result) if flushes and not kind.startswith("bf16") else result

    return Plan((kind,), (kind,), compute)
