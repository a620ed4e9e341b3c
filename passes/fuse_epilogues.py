"""fuse-epilogues: what follows an integer product is done while the product is still in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.ir.edit import Rewriter
from tfqc.ir.match import is_call, is_stored, only_reader
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.ir.views import Add, Mul, Product
from tfqc.lowering.activations import activation_of, geglu_end
from tfqc.passing import Context, Numerics, Pass, close

aten = torch.ops.aten


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
        fused, edit = 0, Rewriter(program)
        for node in program.nodes():
            product = Product.of(node)
            while product is not None:
                product = _take_next(edit, product, self.gates)
                fused += product is not None
        program.prune()
        if fused:
            ctx.remark("fused", count=fused)


def _take_next(edit: Rewriter, product: Product, gates: bool) -> Product | None:
    """Fuse a product into its only reader, which takes its place; None if nothing fits."""
    program, reader = edit.program, only_reader(product.node)
    if reader is None or product.residual is not None:
        return None
    if product.act == "none" and product.gate is None:
        if activation := activation_of(reader):
            return _merge(edit, product, reader, act=activation)
        if (end := geglu_end(program, reader)) and _pairs(program, product):
            return _merge(edit, product, end, act="geglu")
    other = _other(reader, product.node)
    if other is None:
        return None
    if gates and Mul.of(reader) and product.gate is None and _is_row(program, other, product):
        return _merge(edit, product, reader, gate=other)
    same = program.types.get(other.name) == program.types[product.node.name]
    if (total := Add.of(reader)) and same and total.alpha == 1:
        return _merge(edit, product, reader, residual=other)
    return None


def _merge(edit: Rewriter, product: Product, reader: fx.Node, **more: object) -> Product:
    edit.become(reader, product.target, **{**product.node.kwargs, **more})
    return Product(reader)


def _other(node: fx.Node, one: fx.Node) -> fx.Node | None:
    if not is_call(node, aten.add.Tensor, aten.mul.Tensor):
        return None
    others = [a for a in (node.kwargs["self"], node.kwargs["other"]) if a is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _pairs(program: Program, product: Product) -> bool:
    """True if values and gates come in whole blocks of 16 columns, which kernels pair, and the bias is a constant."""
    type_ = program.types[product.node.name]
    assert isinstance(type_, TensorType)
    last = type_.shape[-1]
    fixed = product.bias is None or is_stored(product.bias)
    return product.is_linear and isinstance(last, int) and last % 32 == 0 and fixed


def _is_row(program: Program, value: fx.Node, product: Product) -> bool:
    """True for a value with one number a channel for the batch or each entry: [R, 1, C] beside [B, S, C]."""
    row, whole = program.tensor_type(value), program.tensor_type(product.node)
    if row is None or whole is None or not product.is_linear or len(row.shape) != len(whole.shape):
        return False
    return row.shape[-1] == whole.shape[-1] and set(row.shape[1:-1]) <= {1} and len(row.shape) > 2
