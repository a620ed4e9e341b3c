"""Integer arithmetic and bit operations (PTX ISA: Integer Arithmetic, Logic and Shift, Data Movement: prmt)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.errors import FaultError
from tests.ptx.plans import Mods, Plan, operation
from tests.ptx.scalars import DTYPES, INTEGERS, UNSIGNED, WIDTHS, Array

WIDE = INTEGERS[2:]  # u16 and wider
BITS = ("b16", "b32", "b64")
U32, U64 = np.uint32, np.uint64


def mul_hi(a: Array, b: Array) -> Array:
    """The upper half of products."""
    if a.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * a.itemsize)).astype(a.dtype)
    x, y, low, half = a.view(U64), b.view(U64), U64(0xFFFFFFFF), U64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.view(a.dtype)


def _saturating(sign: int) -> Callable[[Array, Array], Array]:
    def compute(a: Array, b: Array) -> Array:
        wide = a.astype(np.int64) + sign * b.astype(np.int64)
        return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32)

    return compute


@operation("add", "sub", floats=False)
def _add(m: Mods) -> Plan:
    saturates, kind = m.flag("sat"), m.kind(*WIDE)
    if saturates:
        if kind != "s32":
            m.unknown()
        return Plan((kind,), (kind, kind), _saturating(1 if m.name == "add" else -1))
    return Plan((kind,), (kind, kind), np.add if m.name == "add" else np.subtract)


@operation("mul", "mad", floats=False)
def _multiply(m: Mods) -> Plan:
    half, kind = m.one_of("lo", "hi", "wide"), m.kind(*WIDE)
    result = kind
    product: Callable[[Array, Array], Array]
    if half == "wide":
        result = f"{kind[0]}{2 * int(kind[1:])}"
        wide = DTYPES[result]
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    else:
        product = np.multiply if half == "lo" else mul_hi
    if m.name == "mul":
        return Plan((result,), (kind, kind), product)
    return Plan((result,), (kind, kind, result), lambda a, b, c: product(a, b) + c)


def _quotient(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotients rounded to zero and remainders; those by zero are for threads that are not active."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b, a % b
    unsigned = UNSIGNED[a.itemsize]
    quotient = np.abs(a).view(unsigned) // np.abs(b).view(unsigned)
    signed = np.where((a < 0) != (b < 0), -quotient.view(a.dtype), quotient.view(a.dtype))
    return signed, a - signed * b


@operation("div", "rem", floats=False)
def _divide(m: Mods) -> Plan:
    kind, which = m.kind(*WIDE), 0 if m.name == "div" else 1
    return Plan((kind,), (kind, kind), lambda a, b: _quotient(a, b)[which])


@operation("min", "max", floats=False)
def _extremum(m: Mods) -> Plan:
    kind = m.kind(*WIDE)
    return Plan((kind,), (kind, kind), np.minimum if m.name == "min" else np.maximum)


@operation("abs", "neg", floats=False)
def _sign(m: Mods) -> Plan:
    kind = m.kind("s16", "s32", "s64")
    return Plan((kind,), (kind,), np.abs if m.name == "abs" else np.negative)


@operation("and", "or", "xor", floats=False)
def _logic(m: Mods) -> Plan:
    kind = m.kind("pred", *BITS)
    return Plan((kind,), (kind, kind), {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[m.name])


@operation("not", floats=False)
def _not(m: Mods) -> Plan:
    kind = m.kind("pred", *BITS)
    return Plan((kind,), (kind,), np.invert)


@operation("lop3", floats=False)
def _lop3(m: Mods) -> Plan:
    kind = m.kind("b32")

    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for row in range(8):
            if int(table[0]) >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return Plan((kind,), (kind, kind, kind, "b32"), compute)


def _shift(left: bool) -> Callable[[Array, Array], Array]:
    def compute(a: Array, amount: Array) -> Array:
        bits = 8 * a.itemsize
        within = np.minimum(amount, U32(bits - 1)).astype(a.dtype)
        shifted = a << within if left else a >> within
        lost = a.dtype.type(0) if left or a.dtype.kind == "u" else a >> a.dtype.type(bits - 1)
        return np.where(amount >= bits, lost, shifted)

    return compute


@operation("shl", "shr", floats=False)
def _shifts(m: Mods) -> Plan:
    kind = m.kind(*BITS) if m.name == "shl" else m.kind(*BITS, *WIDE)
    return Plan((kind,), (kind, "u32"), _shift(m.name == "shl"))


@operation("shf", floats=False)
def _funnel(m: Mods) -> Plan:
    left, clamps = m.one_of("l", "r") == "l", m.one_of("clamp", "wrap") == "clamp"
    kind = m.kind("b32")

    def compute(low: Array, high: Array, amount: Array) -> Array:
        n = (np.minimum(amount, U32(32)) if clamps else amount & U32(31)).astype(U64)
        both = high.astype(U64) << U64(32) | low
        return ((both << n) >> U64(32) if left else both >> n).astype(U32)

    return Plan((kind,), (kind, kind, "u32"), compute)


PERMUTATIONS = {
    "f4e": lambda i, s: i + s, "b4e": lambda i, s: (s - i) % 8, "rc8": lambda i, s: s % 4,
    "ecl": lambda i, s: max(i, s % 4), "ecr": lambda i, s: min(i, s % 4), "rc16": lambda i, s: 2 * (s % 2) + i % 2,
}  # fmt: skip


@operation("prmt", floats=False)
def _permute(m: Mods) -> Plan:
    kind = m.kind("b32")
    mode = m.one_of(*PERMUTATIONS, default="")
    chosen = np.array([[PERMUTATIONS[mode](i, s) for i in range(4)] for s in range(4)]) if mode else None

    def compute(a: Array, b: Array, selector: Array) -> Array:
        source = np.stack([a, b], 1).view(np.uint8)  # [threads, 8]
        if chosen is not None:
            return np.take_along_axis(source, chosen[selector & U32(3)], 1).view(U32)[:, 0]
        nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=U32)) & U32(15)
        picked = np.take_along_axis(source, (nibbles & U32(7)).astype(np.intp), 1)
        signs = (picked.view(np.int8) >> 7).view(np.uint8)
        return np.ascontiguousarray(np.where(nibbles & U32(8), signs, picked)).view(U32)[:, 0]

    return Plan((kind,), (kind, kind, "b32"), compute)


@operation("bfe", floats=False)
def _extract(m: Mods) -> Plan:
    kind = m.kind("u32", "s32", "u64", "s64")
    dtype, bits = DTYPES[kind], 8 * WIDTHS[kind]

    def compute(a: Array, position: Array, length: Array) -> Array:
        position, length = position & U32(255), length & U32(255)
        shifted = _shift(False)(a.view(UNSIGNED[a.itemsize]), position)
        top = np.maximum(bits - length.astype(np.int64), 0).astype(U32)
        field = _shift(False)(_shift(True)(shifted, top).view(dtype), top)
        if dtype.kind == "i":  # a field that reaches beyond the number is filled with its sign
            beyond = (position.astype(np.int64) + length > bits) & (length > 0)
            field = np.where(beyond, _shift(False)(a, position), field)
        return np.where(length == 0, dtype.type(0), field)

    return Plan((kind,), (kind, "u32", "u32"), compute)


def _mask(position: Array, length: Array, dtype: np.dtype) -> Array:
    ones = np.full(position.shape, ~dtype.type(0))
    return _shift(True)(~_shift(True)(ones, length), position)


@operation("bfi", floats=False)
def _insert(m: Mods) -> Plan:
    kind = m.kind("b32", "b64")

    def compute(a: Array, b: Array, position: Array, length: Array) -> Array:
        position, length = position & U32(255), length & U32(255)
        mask = _mask(position, length, b.dtype)
        return (b & ~mask) | (_shift(True)(a, position) & mask)

    return Plan((kind,), (kind, kind, "u32", "u32"), compute)


@operation("bmsk", floats=False)
def _bit_mask(m: Mods) -> Plan:
    clamps, kind = m.one_of("clamp", "wrap") == "clamp", m.kind("b32")

    def compute(position: Array, length: Array) -> Array:
        limit = (lambda n: np.minimum(n, U32(32))) if clamps else (lambda n: n & U32(31))
        return _mask(limit(position), limit(length), np.dtype(U32))

    return Plan((kind,), ("u32", "u32"), compute)


@operation("szext", floats=False)
def _extend(m: Mods) -> Plan:
    clamps, kind = m.one_of("clamp", "wrap") == "clamp", m.kind("u32", "s32")

    def compute(a: Array, bits: Array) -> Array:
        n = np.minimum(bits, U32(32)) if clamps else bits & U32(31)
        top = U32(32) - n
        return np.where(n == 0, a.dtype.type(0), _shift(False)(_shift(True)(a, top), top))

    return Plan((kind,), (kind, "u32"), compute)


@operation("popc", floats=False)
def _popc(m: Mods) -> Plan:
    return Plan(("u32",), (m.kind("b32", "b64"),), lambda a: np.bitwise_count(a).astype(U32))


def _leading_zeros(a: Array) -> Array:
    bits = 8 * a.itemsize
    smeared = a.copy()
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < bits:
            smeared |= smeared >> a.dtype.type(shift)
    return U32(bits) - np.bitwise_count(smeared).astype(U32)


@operation("clz", floats=False)
def _clz(m: Mods) -> Plan:
    return Plan(("u32",), (m.kind("b32", "b64"),), _leading_zeros)


@operation("bfind", floats=False)
def _find(m: Mods) -> Plan:
    shift_amount, kind = m.flag("shiftamt"), m.kind("u32", "s32", "u64", "s64")

    def compute(a: Array) -> Array:
        bits = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
        zeros = _leading_zeros(bits.view(UNSIGNED[a.itemsize]))
        found = zeros if shift_amount else U32(8 * a.itemsize - 1) - zeros
        return np.where(bits == 0, U32(0xFFFFFFFF), found)

    return Plan(("u32",), (kind,), compute)


@operation("brev", floats=False)
def _reverse(m: Mods) -> Plan:
    kind = m.kind("b32", "b64")

    def compute(a: Array) -> Array:
        bits = np.unpackbits(a.view(np.uint8).reshape(-1, a.itemsize), axis=1, bitorder="little")
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype)[:, 0]

    return Plan((kind,), (kind,), compute)


@operation("dp4a", floats=False)
def _dot(m: Mods) -> Plan:
    kinds: Any = {"u32": np.uint8, "s32": np.int8}
    a_kind, b_kind = m.kind(*kinds), m.kind(*kinds)
    result = "s32" if "s32" in (a_kind, b_kind) else "u32"

    def compute(a: Array, b: Array, c: Array) -> Array:
        x = a.view(kinds[a_kind]).reshape(-1, 4).astype(np.int64)
        y = b.view(kinds[b_kind]).reshape(-1, 4).astype(np.int64)
        return ((x * y).sum(1) + c).astype(U32 if result == "u32" else np.int32)

    return Plan((result,), (a_kind, b_kind, result), compute)


def require_divisors(divisors: Array, mask: Array) -> None:
    """PTX does not say what a division of integers by zero gives: no kernel may do one."""
    wrong = np.flatnonzero((divisors == 0) & mask)
    if wrong.size:
        raise FaultError("divides by zero", int(wrong[0]))
