"""fuse-quantize: values that are only ever read as codes are stored as codes by whatever computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from tfqc.analysis.rewrite import (
    MOVES,
    become,
    changed,
    keeps_batch,
    name_of,
    only_reader,
    operands,
    retype,
    stores,
)  # fmt: skip
from tfqc.ir.program import Program, Stage
from tfqc.lowering.windows import window_of
from tfqc.passing import Context, Numerics, Pass, close
from tfqc.runtime.kernel_ops import CODES


@dataclass(frozen=True)
class FuseQuantize(Pass):
    """Move quantizers up, past views and enlargements, into the ending of the operation that computes the value.

    rows: only where codes are read as the rows in which they were written: no view between, no window of 3 x 3.
    """

    name: ClassVar[str] = "fuse-quantize"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    rows: bool = False

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        quantizers = [n for n in program.nodes() if is_quantizer(n)]
        fused = sum(_fuse(program, node) for node in quantizers if not self.rows or _is_read_as_rows(program, node))
        program.prune()
        if quantizers:
            ctx.remark("quantized-at-source", fused=fused, values=len(quantizers))


def is_quantizer(node: fx.Node) -> bool:
    """True for a map that only quantizes."""
    if name_of(node) != "tfqc.map.default":
        return False
    has = operands(node)
    return has["act"] == "none" and has["out"] in CODES


def _is_read_as_rows(program: Program, quantizer: fx.Node) -> bool:
    return stores(quantizer.args[0]) and all(window_of(program, user) is None for user in quantizer.users)


def _fuse(program: Program, quantizer: fx.Node) -> bool:
    source: Any = quantizer.args[0]
    moved: list[fx.Node] = []
    while name_of(source) in MOVES and only_reader(source) is not None and keeps_batch(program, source):
        moved.append(source)
        source = source.args[0]
    if not stores(source) or operands(source)["out"] != "f32" or only_reader(source) is None:
        return False
    if any(not keeps_batch(program, n) for n in (source, *moved)):
        return False
    its = operands(quantizer)
    ending = {name: its[name] for name in ("row", "out_scale", "out_zero_point", "out")}
    become(program, source, source.target, changed(source, **ending))
    for node in reversed(moved):
        retype(program, node)
    before = quantizer.args[0]
    assert isinstance(before, fx.Node)
    program.replace(quantizer, before)
    return True
