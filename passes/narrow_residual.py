"""narrow-residual: floating point values that only kernels read are stored in bf16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.analysis.rewrite import MOVES, become, name_of, retype
from tfqc.ir.program import Program, Stage
from tfqc.passing import LOSSY, Context, Numerics, Pass

# Which arguments of an operation may be bf16.
_READS = {
    "tfqc.norm.default": (0,), "tfqc.map.default": (0,), "tfqc.gated_add.default": (0, 2),
    "tfqc.attention.default": (0, 1, 2), "tfqc.qlinear.default": (9,), "tfqc.qconv.default": (12,),
    "tfqc.plain.default": (0,), "tfqc.quantize_tokens.default": (0,),
}  # fmt: skip
_CARRIES = MOVES | {"aten.cat.default", "aten.chunk.default", "operator.getitem", "aten.split.Tensor"}
_STORES = {
    "tfqc.qlinear.default", "tfqc.qconv.default", "tfqc.norm.default", "tfqc.map.default", "tfqc.gated_add.default",
    "tfqc.attention.default",
}  # fmt: skip


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
            if name_of(node) in _STORES and node.args[-1] == "f32" and _all_take_it(node):
                become(program, node, node.target, (*node.args[:-1], "bf16"))
                narrowed += 1
        for node in program.nodes():
            if name_of(node) in _CARRIES:
                retype(program, node)
        if narrowed:
            ctx.report.append(f"stored in bf16: {narrowed} values")


def _all_take_it(value: fx.Node) -> bool:
    return all(_takes(user, value) for user in value.users)


def _takes(reader: fx.Node, value: fx.Node) -> bool:
    name = name_of(reader)
    if name in _CARRIES:
        return _all_take_it(reader)
    places = {i for i, argument in enumerate(reader.args) if argument is value}
    return bool(places) and places <= set(_READS.get(name, ()))
