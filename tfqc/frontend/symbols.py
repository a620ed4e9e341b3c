"""Readable names and simple expressions for torch.export's symbolic sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv, Mod

from tfqc.errors import CaptureError
from tfqc.ir.program import Program
from tfqc.ir.types import DTYPES, ScalarType, TensorType, TupleType, Type


def _exact(dividend: sympy.Expr, divisor: sympy.Expr) -> Any:
    """dividend // divisor, without rounding where there is none: (6*B) // B is 6. Sizes are not zero."""
    quotient = sympy.cancel(dividend / divisor)
    return quotient if quotient.is_integer else FloorDiv(dividend, divisor)


def _remainder(dividend: sympy.Expr, divisor: sympy.Expr) -> Any:
    return sympy.Integer(0) if sympy.cancel(dividend / divisor).is_integer else Mod(dividend, divisor)


class Symbols:
    """Readable names for torch.export's symbols: B for the batch, then the names the caller gave, then S0, S1..."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[str, str] = {}

    def bind(self, value: Tensor, dims: Mapping[int, str]) -> None:
        for dim, name in dims.items():
            size = value.shape[dim]
            if isinstance(size, torch.SymInt) and str(size.node.expr).isidentifier():
                self.names.setdefault(str(size.node.expr), name)
                self.program.symbols[self.names[str(size.node.expr)]] = int(size.node.hint or 2)

    def dim(self, size: int | torch.SymInt) -> int | str:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        ours: dict[sympy.Symbol, sympy.Symbol] = {}
        for symbol in sorted(expression.free_symbols, key=str):
            if str(symbol) not in self.names:
                self.names[str(symbol)] = f"S{len(self.names)}"
                self.program.symbols[self.names[str(symbol)]] = 2
            ours[symbol] = sympy.Symbol(self.names[str(symbol)], integer=True, positive=True)
        expression = expression.xreplace(ours).replace(FloorDiv, _exact).replace(Mod, _remainder)
        renamed = str(expression)
        if expression.is_Integer:
            return int(renamed)
        if re.search(r"[^\w\s+*()/\-%]", renamed):
            raise CaptureError(f"A dimension is {renamed}, which the IR cannot say.")
        return renamed

    def type(self, value: Any) -> Type:
        if isinstance(value, Tensor):
            if value.dtype not in DTYPES.values():
                raise CaptureError(f"The model computes in {value.dtype}, which the IR does not know.")
            return TensorType(value.dtype, tuple(self.dim(s) for s in value.shape))
        if isinstance(value, (list, tuple)):
            return TupleType(tuple(self.type(v) for v in value))
        if isinstance(value, torch.SymInt):
            return ScalarType("int", str(self.dim(value)))
        if isinstance(value, torch.SymFloat):
            return ScalarType("float")
        if value is None:
            return ScalarType("none")
        if isinstance(value, torch.SymBool):
            return ScalarType("bool")
        return ScalarType(type(value).__name__, str(value) if isinstance(value, int) else None)
