"""fuse-epilogues: what follows an integer product is done while the product is still in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.analysis.activations import geglu_end, gelu_kind
from tfqc.analysis.rewrite import become, name_of, only_reader
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.passing import Context, Numerics, Pass, close

PRODUCTS = {"tfqc.qlinear.default": 7, "tfqc.qconv.default": 10}  # where the ending begins among the arguments


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Take activations, GEGLU, gates and residual additions into the qlinear or qconv that they follow."""

    name: ClassVar[str] = "fuse-epilogues"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step, from each product onwards."""
        fused = 0
        for product in program.nodes():
            node: fx.Node | None = product
            while node is not None and name_of(node) in PRODUCTS:
                node = _take_next(program, node)
                fused += node is not None
        program.prune()
        if fused:
            ctx.report.append(f"fused into products: {fused} activations, gates and additions")


def _take_next(program: Program, product: fx.Node) -> fx.Node | None:
    """Fuse the product into its only reader, which takes its place; None if nothing fits."""
    at = PRODUCTS[name_of(product)]
    act, gate, residual = product.args[at : at + 3]
    reader = only_reader(product)
    if reader is None:
        return None
    name = name_of(reader)
    if act == "none" and gate is None and residual is None:
        if name == "aten.silu.default" or name == "aten.gelu.default":
            kind = "silu" if "silu" in name else gelu_kind(reader)
            return _merge(program, product, reader, at, kind)
        if name == "aten.chunk.default" and (end := geglu_end(program, reader)) and _pairs(program, product):
            return _merge(program, product, end, at, "geglu")
    if name == "aten.mul.Tensor" and gate is None and residual is None:
        other = _other(reader, product)
        if other is not None and _is_row(program, other, product):
            return _merge(program, product, reader, at + 1, other)
    if name == "aten.add.Tensor" and residual is None and not reader.kwargs:
        other = _other(reader, product)
        if other is not None and program.types.get(other.name) == program.types[product.name]:
            return _merge(program, product, reader, at + 2, other)
    return None


def _merge(program: Program, product: fx.Node, reader: fx.Node, at: int, what: object) -> fx.Node:
    args = [*product.args]
    args[at] = what  # type: ignore[call-overload]
    become(program, reader, product.target, args)
    return reader


def _other(node: fx.Node, one: fx.Node) -> fx.Node | None:
    others = [a for a in node.args[:2] if a is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _pairs(program: Program, product: fx.Node) -> bool:
    """True if values and gates come in whole blocks of 16 columns, which kernels pair, and the bias is a constant."""
    type_, bias = program.types[product.name], product.args[6]
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
