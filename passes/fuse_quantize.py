"""fuse-quantize: values that are only ever read as codes are stored as codes by whatever computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.ir.edit import Rewriter
from tfqc.ir.match import is_call, only_reader
from tfqc.ir.program import Program, Stage
from tfqc.ir.views import Map, Stores
from tfqc.lowering.values import MOVES, keeps_batch, moved
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
        edit = Rewriter(program)
        quantizers = [found for node in program.nodes() if (found := Map.of(node)) and is_quantizer(found)]
        fused = sum(_fuse(edit, q) for q in quantizers if not self.rows or _is_read_as_rows(program, q))
        program.prune()
        if quantizers:
            ctx.remark("quantized-at-source", fused=fused, values=len(quantizers))


def is_quantizer(node: Map) -> bool:
    """True for a map that only quantizes."""
    return node.act == "none" and node.out in CODES


def _is_read_as_rows(program: Program, quantizer: Map) -> bool:
    read = quantizer.node.users
    return Stores.of(quantizer.x) is not None and all(window_of(program, user) is None for user in read)


def _fuse(edit: Rewriter, quantizer: Map) -> bool:
    program, source, between = edit.program, quantizer.x, list[fx.Node]()
    while is_call(source, *MOVES) and only_reader(source) is not None and keeps_batch(program, source):
        between.append(source)
        source = moved(source)
    kernel = Stores.of(source)
    if kernel is None or kernel.out != "f32" or only_reader(source) is None:
        return False
    if any(not keeps_batch(program, n) for n in (source, *between)):
        return False
    ending = {name: quantizer.node.kwargs[name] for name in ("row", "out_scale", "out_zero_point", "out")}
    edit.update(source, **ending)
    edit.replace(quantizer.node, quantizer.x)
    return True
