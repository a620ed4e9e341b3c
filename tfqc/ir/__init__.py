"""The intermediate representation: programs, their types and side tables, their text, their invariants."""

from tfqc.ir.ops import op_by_name, op_name
from tfqc.ir.parse import parse
from tfqc.ir.program import BEGIN, STEP, TIME, Input, Origin, Program, Role, Stage
from tfqc.ir.render import render
from tfqc.ir.tables import Row, row_kind
from tfqc.ir.types import Dim, ScalarType, TensorType, TupleType, Type
from tfqc.ir.verify import verify

__all__ = [
    "BEGIN",
    "STEP",
    "TIME",
    "Dim",
    "Input",
    "Origin",
    "Program",
    "Role",
    "Row",
    "ScalarType",
    "Stage",
    "TensorType",
    "TupleType",
    "Type",
    "op_by_name",
    "op_name",
    "parse",
    "render",
    "row_kind",
    "verify",
]  # fmt: skip
