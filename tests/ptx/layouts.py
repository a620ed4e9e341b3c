"""Which element of a matrix each thread of a warp holds, word for word from the PTX ISA.

This is on purpose not derived from anything else in the project, nor anything from it: it is the second definition of
the fragments, against which what packs them is tested. Each function gives (row, column) of element i of the fragment
of a thread; elements count from the low bits of the first register. `group` and `thread` are what the ISA calls
groupID (%laneid >> 2) and threadID_in_group (%laneid % 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Place = Callable[[int, int, int], tuple[int, int]]


@dataclass(frozen=True)
class Fragment:
    """A matrix of rows x columns, `elements` of which are in each thread, at `place(group, thread, i)`."""

    rows: int
    columns: int
    elements: int
    place: Place

    def at(self, lane: int, i: int) -> tuple[int, int]:
        return self.place(lane >> 2, lane % 4, i)


@dataclass(frozen=True)
class Layout:
    """The fragments of one shape: A, B, and the accumulators C and D."""

    a: Fragment
    b: Fragment
    c: Fragment


# Accumulators (C or D): the same words in every section below --------------------------------------------------------


def _c(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if i < 2 else group + 8
    col = (thread * 2) + (i & 0x1)
    return row, col


_C = Fragment(16, 8, 4, _c)


# Matrix Fragments for mma.m16n8k8, .f16 and .bf16 --------------------------------------------------------------------


def _m16n8k8_half_a(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if i < 2 else group + 8  # a0 and a1; a2 and a3
    col = thread * 2 + (i & 0x1)
    return row, col


def _m16n8k8_half_b(group: int, thread: int, i: int) -> tuple[int, int]:
    return (thread * 2) + i, group


# Matrix Fragments for mma.m16n8k16 with floating point type, .f16 and .bf16 ------------------------------------------


def _m16n8k16_half_a(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    col = (thread * 2) + (i & 0x1) if i < 4 else (thread * 2) + (i & 0x1) + 8
    return row, col


def _m16n8k16_half_b(group: int, thread: int, i: int) -> tuple[int, int]:
    row = (thread * 2) + (i & 0x1) if i < 2 else (thread * 2) + (i & 0x1) + 8
    return row, group


# Matrix Fragments for mma.m16n8k16 with integer type, .u8 / .s8 ------------------------------------------------------


def _m16n8k16_byte_a(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if i < 4 else group + 8
    col = (thread * 4) + (i & 0x3)
    return row, col


def _m16n8k16_byte_b(group: int, thread: int, i: int) -> tuple[int, int]:
    return (thread * 4) + i, group


# Matrix Fragments for mma.m16n8k32, .s4 or .u4 -----------------------------------------------------------------------


def _m16n8k32_nibble_a(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if i < 8 else group + 8
    col = (thread * 8) + (i & 0x7)
    return row, col


def _m16n8k32_nibble_b(group: int, thread: int, i: int) -> tuple[int, int]:
    return (thread * 8) + (i & 0x7), group


# Matrix Fragments for mma.m16n8k32, .s8 or .u8 -----------------------------------------------------------------------


def _m16n8k32_byte_a(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    col = (thread * 4) + (i & 0x3) if i < 8 else (thread * 4) + (i & 0x3) + 16
    return row, col


def _m16n8k32_byte_b(group: int, thread: int, i: int) -> tuple[int, int]:
    row = (thread * 4) + (i & 0x3) if i < 4 else (thread * 4) + (i & 0x3) + 16
    return row, group


# Matrix Fragments for mma.m16n8k64, .s4 / .u4 ------------------------------------------------------------------------


def _m16n8k64_nibble_a(group: int, thread: int, i: int) -> tuple[int, int]:
    row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
    col = (thread * 8) + (i & 0x7) if i < 16 else (thread * 8) + (i & 0x7) + 32
    return row, col


def _m16n8k64_nibble_b(group: int, thread: int, i: int) -> tuple[int, int]:
    row = (thread * 8) + (i & 0x7) if i < 8 else (thread * 8) + (i & 0x7) + 32
    return row, group


MMA: dict[tuple[str, int], Layout] = {  # by shape and the bits of an element of A and B
    ("m16n8k8", 16): Layout(Fragment(16, 8, 4, _m16n8k8_half_a), Fragment(8, 8, 2, _m16n8k8_half_b), _C),
    ("m16n8k16", 16): Layout(Fragment(16, 16, 8, _m16n8k16_half_a), Fragment(16, 8, 4, _m16n8k16_half_b), _C),
    ("m16n8k16", 8): Layout(Fragment(16, 16, 8, _m16n8k16_byte_a), Fragment(16, 8, 4, _m16n8k16_byte_b), _C),
    ("m16n8k32", 4): Layout(Fragment(16, 32, 16, _m16n8k32_nibble_a), Fragment(32, 8, 8, _m16n8k32_nibble_b), _C),
    ("m16n8k32", 8): Layout(Fragment(16, 32, 16, _m16n8k32_byte_a), Fragment(32, 8, 8, _m16n8k32_byte_b), _C),
    ("m16n8k64", 4): Layout(Fragment(16, 64, 32, _m16n8k64_nibble_a), Fragment(64, 8, 16, _m16n8k64_nibble_b), _C),
}


# Warp-level matrix load instruction: ldmatrix, .m8n8 -----------------------------------------------------------------


def ldmatrix_address(matrix: int, row: int) -> int:
    """The thread whose address is that of a row: threads 0-7 for the first matrix, 8-15 for the second, and so on."""
    return matrix * 8 + row


def ldmatrix_element(lane: int, half: int, transposed: bool) -> tuple[int, int]:
    """(row, column) of the 16-bit element in the lower (0) or upper (1) half of the register for a matrix.

    Row r is spread over threads 4r ... 4r+3, two elements in each; with .trans the matrix is read in column-major.
    """
    row, column = lane // 4, 2 * (lane % 4) + half
    return (column, row) if transposed else (row, column)
