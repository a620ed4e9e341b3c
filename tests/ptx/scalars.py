"""PTX types as numpy types. A pair (f16x2, bf16x2) is viewed as an array of twice the length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
        "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
        "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
        "f16x2": np.float16, "bf16x2": np.uint16,
        "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    }.items()
}  # fmt: skip
WIDTHS = {name: dtype.itemsize * (2 if name.endswith("x2") else 1) for name, dtype in DTYPES.items()}  # bytes
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


def storage(kind: str) -> np.dtype:
    """The type that holds the bits of a register: unsigned, or bool for a predicate."""
    return DTYPES["pred"] if kind == "pred" else UNSIGNED[WIDTHS[kind]]


def narrow(bits: Array, kind: str) -> Array:
    """The low bits of registers as values of a type that may be narrower; pairs come out twice as long."""
    return bits.astype(UNSIGNED[WIDTHS[kind]], copy=False).view(DTYPES[kind])


def widen(values: Array, kind: str, register: np.dtype) -> Array:
    """Values of a type as the bits of a register that may be wider: signed ones extend their sign."""
    bits = values.view(UNSIGNED[WIDTHS[kind]])
    if bits.dtype == register:
        return bits
    if kind[0] == "s":
        return values.astype(SIGNED[register.itemsize]).view(register)
    return bits.astype(register)
