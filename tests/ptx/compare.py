"""Comparison and selection (PTX ISA: Comparison and Selection Instructions)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx import rounding
from tests.ptx.floating import decode
from tests.ptx.plans import FLOATS, Mods, Plan, operation
from tests.ptx.scalars import DTYPES, INTEGERS, Array

BITS = ("b16", "b32", "b64")
Comparison = Callable[[Array, Array], Array]
ORDERED: dict[str, Comparison] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
SAME = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # names for unsigned numbers
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(m: Mods) -> Comparison:
    """With NaN, .eq ... .ge (and .ne) are false, .equ ... .geu (and .neu) are true."""
    name = m.one_of(*ORDERED, *SAME, *(f"{each}u" for each in ORDERED), "num", "nan")
    floats = m.rest[-1] in FLOATS
    if floats == (name in SAME) and (floats or name not in ORDERED):
        m.unknown()
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    compare = ORDERED.get(SAME.get(name, name)) or ORDERED[name[:-1]]
    if not floats:
        return compare
    if name in ORDERED:
        return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _prepared(compare: Comparison, kind: str, flushes: bool) -> Comparison:
    def compute(a: Array, b: Array) -> Array:
        a, b = decode(a, kind), decode(b, kind)
        return compare(rounding.flush(a), rounding.flush(b)) if flushes else compare(a, b)

    return compute


@operation("setp")
def _setp(m: Mods) -> Plan:
    """Of a pair of halves there are two results; else the second result is the complement of the first."""
    compare = _comparison(m)
    boolean = m.one_of(*BOOLEAN, default="")
    flushes, kind = m.flag("ftz"), m.kind(*INTEGERS, *BITS, *FLOATS)
    compare = _prepared(compare, kind, flushes)

    def compute(a: Array, b: Array, *more: Array) -> tuple[Array, Array]:
        result = compare(a, b)
        both = (result[0::2], result[1::2]) if kind.endswith("x2") else (result, ~result)
        if not boolean:
            return both
        return BOOLEAN[boolean](both[0], more[0]), BOOLEAN[boolean](both[1], more[0])

    return Plan(("pred", "pred"), (kind, kind, *(["pred"] if boolean else [])), compute)


@operation("set")
def _set(m: Mods) -> Plan:
    """All ones for integers, 1.0 for floats."""
    compare = _comparison(m)
    flushes = m.flag("ftz")
    result, kind = m.kind("u32", "s32", *FLOATS), m.kind(*INTEGERS, *BITS, *FLOATS)
    compare = _prepared(compare, kind, flushes)
    if kind.endswith("x2") and result in ("u32", "s32"):
        true, dtype = 0xFFFF, np.dtype(np.uint16)
    else:
        dtype = DTYPES[result]
        true = {"u32": 0xFFFFFFFF, "s32": -1, "bf16": 0x3F80, "bf16x2": 0x3F80}.get(result, 1)
    if kind.endswith("x2") != result.endswith("x2") and dtype != np.uint16:
        m.unknown()
    return Plan((result,), (kind, kind), lambda a, b: compare(a, b).astype(dtype) * dtype.type(true))


@operation("selp")
def _selp(m: Mods) -> Plan:
    kind = m.kind(*BITS, *INTEGERS, "f32", "f64")
    return Plan((kind,), (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


@operation("slct")
def _slct(m: Mods) -> Plan:
    flushes = m.flag("ftz")
    kind, selector = m.kind(*BITS, *INTEGERS, "f32", "f64"), m.kind("s32", "f32")

    def compute(a: Array, b: Array, c: Array) -> Array:
        return np.where((rounding.flush(c) if flushes else c) >= 0, a, b)

    return Plan((kind,), (kind, kind, selector), compute)
