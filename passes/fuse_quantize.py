"""fuse-quantize: values that are only ever read as codes are stored as codes by whatever computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from tfqc.analysis.rewrite import MOVES, become, keeps_batch, name_of, only_reader, retype
from tfqc.ir.program import Program, Stage
from tfqc.passing import Context, Numerics, Pass, close

# Operations with an ending: how many of its last arguments are (row, out_scale, out_zero_point, out).
ENDINGS = {
    "tfqc.qlinear.default", "tfqc.qconv.default", "tfqc.norm.default", "tfqc.map.default", "tfqc.gated_add.default",
    "tfqc.attention.default",
}  # fmt: skip


@dataclass(frozen=True)
class FuseQuantize(Pass):
    """Move quantizers up, past views and enlargements, into the ending of the operation that computes the value."""

    name: ClassVar[str] = "fuse-quantize"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        quantizers = [n for n in program.nodes() if is_quantizer(n)]
        fused = sum(_fuse(program, node) for node in quantizers)
        program.prune()
        if quantizers:
            ctx.report.append(f"quantized where it is computed: {fused} of {len(quantizers)} values")


def is_quantizer(node: fx.Node) -> bool:
    """True for a map that only quantizes."""
    return name_of(node) == "tfqc.map.default" and node.args[1] == "none" and node.args[-1] == "u8"


def _fuse(program: Program, quantizer: fx.Node) -> bool:
    source: Any = quantizer.args[0]
    moved: list[fx.Node] = []
    while name_of(source) in MOVES and only_reader(source) is not None and keeps_batch(program, source):
        moved.append(source)
        source = source.args[0]
    if name_of(source) not in ENDINGS or source.args[-1] != "f32" or only_reader(source) is None:
        return False
    if any(not keeps_batch(program, n) for n in (source, *moved)):
        return False
    become(program, source, source.target, (*source.args[:-4], *quantizer.args[-4:]))
    for node in reversed(moved):
        retype(program, node)
    before = quantizer.args[0]
    assert isinstance(before, fx.Node)
    program.replace(quantizer, before)
    return True
