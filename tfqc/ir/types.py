"""Types of values: dtype and shape, where a dimension is a number or an expression over symbols (`B`, `2*B`)."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tfqc.errors import IRError

Dim = int | str

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
    "bool": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor: `Bx4x16x16xf32`."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        dims = [str(d) if isinstance(d, int) or d.isidentifier() else f"({d})" for d in self.shape]
        return "x".join([*dims, DTYPE_NAMES[self.dtype]])


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python number: `int<B>` is an int whose value is the symbol B; `float` has no known value."""

    kind: str
    value: str | None = None

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}<{self.value}>"


@dataclass(frozen=True, slots=True)
class TupleType:
    """Several values, as `chunk` and `split` return them: `(Bx3xf32, Bx3xf32)`."""

    items: tuple[Type, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


Type = TensorType | ScalarType | TupleType


def evaluate(dim: Dim, symbols: Mapping[str, int]) -> int:
    """The value of a dimension, given one for each symbol. Only integer arithmetic is understood."""

    def walk(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int() as value):
                return value
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case _:
                raise IRError(f"Dimension {dim!r} is not integer arithmetic over {sorted(symbols) or 'no symbols'}.")

    return dim if isinstance(dim, int) else walk(ast.parse(dim, mode="eval").body)


def symbols_of(type_: Type) -> set[str]:
    """Names of the symbols that a type mentions."""
    match type_:
        case TensorType(shape=shape):
            return {s for d in shape if isinstance(d, str) for s in re.findall(r"[A-Za-z_]\w*", d)}
        case ScalarType(value=value):
            return set(re.findall(r"[A-Za-z_]\w*", value or ""))
        case TupleType(items=items):
            return {s for item in items for s in symbols_of(item)}


def parse_type(text: str) -> Type:
    """Inverse of `str(type)`.

    Raises:
        IRError: the text is no type.
    """
    type_, end = _parse_type(text, 0)
    if end != len(text):
        raise IRError(f"{text!r} is not a type: {text[end:]!r} is left over.")
    return type_


_SCALAR = re.compile(r"(int|float|bool|none)(?:<([^>]*)>)?(?![\w])")
_DIM = re.compile(r"(\d+|\([^()]*(?:\([^()]*\)[^()]*)*\)|[A-Z]\w*)x")
_DTYPE = re.compile("|".join(sorted(DTYPES, key=len, reverse=True)))


def _parse_type(text: str, at: int) -> tuple[Type, int]:
    if scalar := _SCALAR.match(text, at):
        if not text.startswith("bool", at) or scalar[2] is not None or scalar[1] != "bool":
            return ScalarType(scalar[1], scalar[2]), scalar.end()
        return TensorType(torch.bool, ()), scalar.end()
    dims: list[Dim] = []
    position = at
    while dim := _DIM.match(text, position):
        dims.append(int(dim[1]) if dim[1].isdigit() else dim[1].removeprefix("(").removesuffix(")"))
        position = dim.end()
    if dtype := _DTYPE.match(text, position):
        return TensorType(DTYPES[dtype[0]], tuple(dims)), dtype.end()
    if text.startswith("(", at):
        items: list[Type] = []
        position = at + 1
        while not text.startswith(")", position):
            item, position = _parse_type(text, position)
            items.append(item)
            if text.startswith(", ", position):
                position += 2
            elif not text.startswith(")", position):
                break
        else:
            return TupleType(tuple(items)), position + 1
    raise IRError(f"{text[at:]!r} does not begin with a type such as 'Bx4x16x16xf32' or 'int<B>'.")
