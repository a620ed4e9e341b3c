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

# Symbols have no small letters, so that the `x` between dimensions ends them.
SYMBOL = re.compile(r"[A-Z][A-Z0-9_]*")

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
        dims = [str(d) if isinstance(d, int) or SYMBOL.fullmatch(d) else f"({d})" for d in self.shape]
        return "x".join([*dims, DTYPE_NAMES[self.dtype]])


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

    try:
        return dim if isinstance(dim, int) else walk(_expression(dim))
    except ZeroDivisionError as error:
        raise IRError(f"Dimension {dim!r} divides by zero for {dict(symbols)}.") from error


def _expression(dim: str) -> ast.expr:
    try:
        return ast.parse(dim, mode="eval").body
    except SyntaxError as error:
        raise IRError(f"Dimension {dim!r} is not integer arithmetic: {error.msg}.") from error


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


_SCALAR = re.compile(r"bool<>|(int|float|none)(?:<([^<>]+)>)?(?!\w)")
_DIM = re.compile(rf"(\d+|{SYMBOL.pattern})x")
_DTYPE = re.compile("|".join(sorted(DTYPES, key=len, reverse=True)))


def _parse_type(text: str, at: int) -> tuple[Type, int]:
    if scalar := _SCALAR.match(text, at):
        return ScalarType(scalar[1] or "bool", scalar[2]), scalar.end()
    dims: list[Dim] = []
    position = at
    while (found := _parse_dim(text, position)) is not None:
        dims.append(found[0])
        position = found[1]
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


def _parse_dim(text: str, at: int) -> tuple[Dim, int] | None:
    """One dimension and the `x` behind it: a number, a symbol, or an expression in balanced parentheses."""
    if simple := _DIM.match(text, at):
        return int(simple[1]) if simple[1].isdigit() else simple[1], simple.end()
    depth = 0
    for end in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            if end == at or not text.startswith("x", end + 1):
                return None
            expression = text[at + 1 : end]
            _expression(expression)
            return expression, end + 2
    return None
