"""Readable names and simple expressions for torch.export's symbolic sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from tfqc.errors import CaptureError
from tfqc.frontend.arithmetic import NoArithmetic, simplified, written
from tfqc.ir.program import Program
from tfqc.ir.types import DTYPES, ScalarType, TensorType, TupleType, Type


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
        expression = self.expression(size.node.expr)
        try:
            return int(expression) if expression.is_Integer else written(expression)
        except NoArithmetic as error:
            raise CaptureError(f"A dimension is {error}, which the IR cannot say.") from error

    def expression(self, theirs: Any) -> Any:
        """An expression or a relation over torch.export's symbols, over ours."""
        ours: dict[sympy.Symbol, sympy.Symbol] = {}
        for symbol in sorted(theirs.free_symbols, key=str):
            if str(symbol).startswith("u"):
                raise CaptureError("A size depends on what a tensor holds, and not on sizes alone.")
            if str(symbol) not in self.names:
                self.names[str(symbol)] = f"S{len(self.names)}"
                self.program.symbols[self.names[str(symbol)]] = 2
            ours[symbol] = sympy.Symbol(self.names[str(symbol)], integer=True, positive=True)
        return simplified(theirs.xreplace(ours))

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
