"""narrow-residual: floating point values that only kernels read are stored in bf16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.analysis.rewrite import MOVES, become, changed, name_of, operands, retype, stores
from tfqc.ir.program import Program, Stage
from tfqc.passing import LOSSY, Context, Numerics, Pass

# Arguments of kernels that may be bf16: parameters (bias, gate, weight, mask) are not among them.
_VALUES = {"x", "residual", "q", "k", "v"}
_ALSO_READ = {"tfqc.plain.default", "tfqc.quantize_tokens.default"}
_CARRIES = MOVES | {"aten.cat.default", "aten.chunk.default", "operator.getitem", "aten.split.Tensor"}


@dataclass(frozen=True)
class NarrowResidual(Pass):
    """Halve the memory traffic between kernels; what torch reads stays f32."""

    name: ClassVar[str] = "narrow-residual"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = LOSSY

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        narrowed = 0
        for node in reversed(list(program.step.nodes)):
            if stores(node) and operands(node)["out"] == "f32" and _all_take_it(node):
                become(program, node, node.target, changed(node, out="bf16"))
                narrowed += 1
        for node in program.nodes():
            if name_of(node) in _CARRIES:
                retype(program, node)
        if narrowed:
            ctx.remark("stored", form="bf16", count=narrowed)


def _all_take_it(value: fx.Node) -> bool:
    return all(_takes(user, value) for user in value.users)


def _takes(reader: fx.Node, value: fx.Node) -> bool:
    name = name_of(reader)
    if name in _CARRIES:
        return _all_take_it(reader)
    if not stores(reader) and name not in _ALSO_READ:
        return False
    return {argument for argument, given in operands(reader).items() if given is value} <= _VALUES
