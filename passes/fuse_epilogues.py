"""fuse-epilogues: what follows an integer product is done while the product is still in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.analysis.rewrite import become, changed, name_of, only_reader, operands
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.lowering.activations import geglu_end, gelu_kind
from tfqc.passing import Context, Numerics, Pass, close

PRODUCTS = {"tfqc.qlinear.default", "tfqc.qconv.default"}


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Take activations, GEGLU, gates and residual additions into the qlinear or qconv that they follow.

    gates: false leaves them, for kernels that have none.
    """

    name: ClassVar[str] = "fuse-epilogues"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    gates: bool = True

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step, from each product onwards."""
        fused = 0
        for product in program.nodes():
            node: fx.Node | None = product
            while node is not None and name_of(node) in PRODUCTS:
                node = _take_next(program, node, self.gates)
                fused += node is not None
        program.prune()
        if fused:
            ctx.remark("fused", count=fused)


def _take_next(program: Program, product: fx.Node, gates: bool) -> fx.Node | None:
    """Fuse the product into its only reader, which takes its place; None if nothing fits."""
    has = operands(product)
    reader = only_reader(product)
    if reader is None or has["residual"] is not None:
        return None
    name = name_of(reader)
    if has["act"] == "none" and has["gate"] is None:
        if name in ("aten.silu.default", "aten.gelu.default"):
            return _merge(program, product, reader, act="silu" if "silu" in name else gelu_kind(reader))
        if name == "aten.chunk.default" and (end := geglu_end(program, reader)) and _pairs(program, product):
            return _merge(program, product, end, act="geglu")
    other = _other(reader, product)
    if other is None:
        return None
    if gates and name == "aten.mul.Tensor" and has["gate"] is None and _is_row(program, other, product):
        return _merge(program, product, reader, gate=other)
    same = program.types.get(other.name) == program.types[product.name]
    if name == "aten.add.Tensor" and same and not reader.kwargs:
        return _merge(program, product, reader, residual=other)
    return None


def _merge(program: Program, product: fx.Node, reader: fx.Node, **more: object) -> fx.Node:
    become(program, reader, product.target, changed(product, **more))
    return reader


def _other(node: fx.Node, one: fx.Node) -> fx.Node | None:
    others = [a for a in node.args[:2] if a is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _pairs(program: Program, product: fx.Node) -> bool:
    """True if values and gates come in whole blocks of 16 columns, which kernels pair, and the bias is a constant."""
    type_, bias = program.types[product.name], operands(product)["bias"]
    assert isinstance(type_, TensorType)
    last = type_.shape[-1]
    fixed = bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")
    return name_of(product) == "tfqc.qlinear.default" and isinstance(last, int) and last % 32 == 0 and fixed


def _is_row(program: Program, value: fx.Node, product: fx.Node) -> bool:
    """True for a value with one number a channel for the batch or each entry: [R, 1, C] beside [B, S, C]."""
    own, its = program.tensor_type(value), program.tensor_type(product)
    if own is None or its is None or name_of(product) != "tfqc.qlinear.default" or len(own.shape) != len(its.shape):
        return False
    return own.shape[-1] == its.shape[-1] and set(own.shape[1:-1]) <= {1} and len(own.shape) > 2
