"""Types of values: dtype and shape, where a dimension is a number or an expression over symbols (`B`, `2*B`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from tfqc.errors import IRError
from tfqc.ir.dims import MAX, SYMBOL, Dim, check_dim, symbols_in
from tfqc.ir.dims import evaluate as evaluate

# Every dtype that a program can compute in. Those of 8 bits are named as in MLIR.
DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
    "u64": torch.uint64, "u32": torch.uint32, "u16": torch.uint16, "bool": torch.bool,
    "c64": torch.complex64, "c128": torch.complex128,
    "f8E4M3FN": torch.float8_e4m3fn, "f8E4M3FNUZ": torch.float8_e4m3fnuz,
    "f8E5M2": torch.float8_e5m2, "f8E5M2FNUZ": torch.float8_e5m2fnuz, "f8E8M0FNU": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Those of them that tensors in files can have: safetensors has no other. The others are of values alone.
STORABLE = frozenset(DTYPES.values()) - {torch.complex128}

# Those of which models are made that are computed in f32.
HALVES = (torch.float16, torch.bfloat16)

_DEEPEST, _MOST_DIMS, _LONGEST_DIM = 16, 64, 1000


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in IR text.

    Raises:
        IRError: the IR has no name for it (quantized ones, bits, integers of less than 8 bits).
    """
    if dtype not in DTYPE_NAMES:
        raise IRError(f"{dtype} is no dtype that the IR knows: convert the tensor to one of {', '.join(DTYPES)}.")
    return DTYPE_NAMES[dtype]


def storable(name: str, dtype: torch.dtype) -> str:
    """Why a tensor of this dtype cannot be stored; empty if it can."""
    if dtype in STORABLE:
        return ""
    advice = "keep it as complex64, or as real pairs" if dtype.is_complex else "convert it"
    return f"tensor @{name} is {dtype}, which no safetensors file holds: {advice} in the model."


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor: `Bx4x16x16xf32`."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        dims = [str(d) if isinstance(d, int) or SYMBOL.fullmatch(d) else f"({d})" for d in self.shape]
        return "x".join([*dims, dtype_name(self.dtype)])


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python number: `int<B>` is an int whose value is the symbol B; `float` has no known value.

    A Python bool is written `bool<>`: `bool` is a tensor of no dimensions.
    """

    kind: str
    value: str | None = None

    def __str__(self) -> str:
        return self.kind if self.value is None and self.kind != "bool" else f"{self.kind}<{self.value or ''}>"


@dataclass(frozen=True, slots=True)
class TupleType:
    """Several values, as `chunk` and `split` return them: `(Bx3xf32, Bx3xf32)`."""

    items: tuple[Type, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


Type = TensorType | ScalarType | TupleType


def symbols_of(type_: Type) -> set[str]:
    """Names of the symbols that a type mentions."""
    match type_:
        case TensorType(shape=shape):
            return {s for d in shape if isinstance(d, str) for s in symbols_in(d)}
        case ScalarType(value=value):
            return symbols_in(value or "")
        case TupleType(items=items):
            return {s for item in items for s in symbols_of(item)}


def check_size(type_: TensorType) -> None:
    """Refuse a tensor that no machine can hold: more elements than 64 bits count, or 64 dimensions."""
    known = 1
    for dim in type_.shape:
        known *= max(dim, 1) if isinstance(dim, int) else 1
        if known > MAX >> 4 or len(type_.shape) > _MOST_DIMS:  # 16 bytes an element at most
            raise IRError(f"{str(type_)[:80]!r} is larger than any tensor can be.")


def parse_type(text: str) -> Type:
    """Inverse of `str(type)`.

    Raises:
        IRError: the text is no type.
    """
    type_, end = _parse_type(text, 0)
    if end != len(text):
        raise IRError(f"{text!r} is not a type: {text[end:]!r} is left over.")
    return type_


_SCALAR = re.compile(r"bool<>|(int|float|none)(?:<([^<>]+)>)?(?![A-Za-z0-9_])")
_DIM = re.compile(rf"([0-9]+|{SYMBOL.pattern})x")
_DTYPE = re.compile("|".join(sorted(DTYPES, key=len, reverse=True)))


def _parse_type(text: str, at: int, depth: int = 0) -> tuple[Type, int]:
    if scalar := _SCALAR.match(text, at):
        return _scalar(scalar[1] or "bool", scalar[2]), scalar.end()
    dims: list[Dim] = []
    position = at
    while (found := _parse_dim(text, position)) is not None:
        dims.append(found[0])
        position = found[1]
    if dtype := _DTYPE.match(text, position):
        return TensorType(DTYPES[dtype[0]], tuple(dims)), dtype.end()
    if text.startswith("(", at) and depth < _DEEPEST:
        items: list[Type] = []
        position = at + 1
        while not text.startswith(")", position):
            item, position = _parse_type(text, position, depth + 1)
            items.append(item)
            if text.startswith(", ", position):
                position += 2
            elif not text.startswith(")", position):
                break
        else:
            return TupleType(tuple(items)), position + 1
    raise IRError(f"{text[at : at + 80]!r} does not begin with a type such as 'Bx4x16x16xf32' or 'int<B>'.")


def _scalar(kind: str, value: str | None) -> ScalarType:
    if value is not None:
        if kind != "int":
            raise IRError(f"'{kind}<{value}>': only an int has a value that its type tells.")
        check_dim(value)
    return ScalarType(kind, value)


def _parse_dim(text: str, at: int) -> tuple[Dim, int] | None:
    """One dimension and the `x` behind it: a number, a symbol, or an expression in balanced parentheses."""
    if simple := _DIM.match(text, at):
        if not simple[1].isdigit():
            return simple[1], simple.end()
        if len(simple[1]) > 19:
            raise IRError(f"{simple[1][:40]!r} is more than a dimension can be.")
        return int(simple[1]), simple.end()
    depth = 0
    for end in range(at, min(len(text), at + _LONGEST_DIM)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            if end == at or not text.startswith("x", end + 1):
                return None
            expression = text[at + 1 : end]
            check_dim(expression)
            return expression, end + 2
    return None
