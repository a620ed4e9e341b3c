"""mma.sync and ldmatrix: products of fragments by matrices, with the layouts of `layouts`.

Integer products and sums are exact (s32 wraps, or saturates with .satfinite). Floating point products are exact, and
their sum with the accumulator is taken in float64 and rounded once for each instruction: the ISA leaves order and
intermediate rounding to the device, which may differ in the last bits unless all sums are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.ptx import layouts
from tests.ptx.floating import encode
from tests.ptx.layouts import Fragment
from tests.ptx.plans import Mods
from tests.ptx.registers import WARP
from tests.ptx.rounding import from_bf16
from tests.ptx.scalars import Array

BITS = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "f16": 16, "bf16": 16}


@functools.cache
def _gather(fragment: Fragment) -> NDArray[np.intp]:
    """[rows, columns]: which element of the 32 fragments, one behind the other, each element of the matrix is."""
    where = np.full((fragment.rows, fragment.columns), -1, np.intp)
    for lane in range(WARP):
        for i in range(fragment.elements):
            where[fragment.at(lane, i)] = lane * fragment.elements + i
    return where


@functools.cache
def _scatter(fragment: Fragment) -> NDArray[np.intp]:
    """[32, elements]: which element of the matrix, row by row, each element of the fragments is."""
    places = [[fragment.at(lane, i) for i in range(fragment.elements)] for lane in range(WARP)]
    return np.array([[row * fragment.columns + column for row, column in each] for each in places])


@functools.cache
def _nibbles(kind: str) -> NDArray[np.float32]:
    """[256, 2]: the two 4-bit numbers of a byte, the lower first."""
    both = np.arange(256)[:, None] >> np.array([0, 4]) & 15
    return (both - 16 * (both > 7) * (kind == "s4")).astype(np.float32)


def elements(registers: NDArray[np.uint32], kind: str) -> Array:
    """[threads, registers] to [threads, elements], as float32 for integers and float64 for the others; exact."""
    if kind in ("s4", "u4"):
        return _nibbles(kind)[registers.view(np.uint8)].reshape(len(registers), -1)
    if kind in ("s8", "u8"):
        return registers.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)
    halves = registers.view(np.uint16)
    return (halves.view(np.float16) if kind == "f16" else from_bf16(halves)).astype(np.float64)


def matrices(fragments: Array, fragment: Fragment) -> Array:
    """[threads, elements] to [warps, rows, columns]."""
    return fragments.reshape(-1, WARP * fragment.elements)[:, _gather(fragment)]


@dataclass(frozen=True)
class Product:
    """One variant of mma: how many registers each operand has, and the function on arrays [threads, registers]."""

    registers: tuple[int, int, int, int]  # d, a, b, c
    compute: Callable[[Array, Array, Array], Array]


def product(mods: tuple[str, ...]) -> Product:
    """The variant of these parts of an opcode; raises for those that are not known."""
    m = Mods("mma", mods)
    m.kind("sync")
    m.kind("aligned")
    shape = m.one_of(*{shape for shape, _ in layouts.MMA})
    m.kind("row")
    m.kind("col")
    saturates = m.flag("satfinite")
    d_kind, a_kind, b_kind = m.kind("s32", "f32", "f16"), m.kind(*BITS), m.kind(*BITS)
    c_kind = m.kind("s32", "f32", "f16")
    m.done()
    bits = BITS[a_kind]
    integers = bits < 16
    fits = (d_kind == c_kind == "s32") if integers else (a_kind == b_kind and "s32" not in (d_kind, c_kind))
    halves = "f16" in (d_kind, c_kind)
    layout = layouts.MMA.get((shape, bits))
    if (
        not fits
        or BITS[b_kind] != bits
        or layout is None
        or (saturates and not integers)
        or (halves and a_kind != "f16")
    ):
        m.unknown()
    assert layout is not None
    scatter = _scatter(layout.c)

    def accumulators(registers: NDArray[np.uint32]) -> Array:
        values = registers.view({"s32": np.int32, "f32": np.float32, "f16": np.float16}[c_kind])
        return values.astype(np.int64 if integers else np.float64)

    def compute(a: Array, b: Array, c: Array) -> Array:
        left, right = matrices(elements(a, a_kind), layout.a), matrices(elements(b, b_kind), layout.b)
        products = np.matmul(left, right).reshape(len(left), -1)[:, scatter].reshape(-1, layout.c.elements)
        if integers:  # at most 64 * 255 * 255, exact in float32
            total = products.astype(np.int64) + accumulators(c)
            total = np.clip(total, -(2**31), 2**31 - 1) if saturates else total
            return total.astype(np.int32).view(np.uint32)
        return encode(products + accumulators(c), d_kind).view(np.uint32)

    def count(fragment: Fragment, width: int) -> int:
        return fragment.elements * width // 32

    return Product(
        (
            count(layout.c, 16 if d_kind == "f16" else 32),
            count(layout.a, bits),
            count(layout.b, bits),
            count(layout.c, 16 if c_kind == "f16" else 32),
        ),
        compute,
    )


@functools.cache
def ldmatrix_gather(transposed: bool) -> NDArray[np.intp]:
    """[32, 2]: which of the 64 elements of a matrix, row by row, the halves of each thread's register are."""
    places = [[layouts.ldmatrix_element(lane, half, transposed) for half in range(2)] for lane in range(WARP)]
    return np.array([[row * 8 + column for row, column in each] for each in places])
