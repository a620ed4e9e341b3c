"""channels-last: images lie in memory with their channels next to each other, from the first operation to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tfqc.ir.edit import Rewriter
from tfqc.ir.match import is_call
from tfqc.ir.program import Program, Role, Stage
from tfqc.passing import EXACT, Context, Numerics, Pass

aten, ours = torch.ops.aten, torch.ops.tfqc
_REORDERS = (aten.contiguous.default, aten.clone.default)
# Refuse what lies in memory in another order than their shape says; reshape does not.
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Reorder the sample on its way in and the outputs on their way out; in between, what becomes complex.

    What has been reordered already is left.
    """

    name: ClassVar[str] = "channels-last"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = EXACT

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        edit = Rewriter(program)
        for node in program.nodes():
            if is_call(node, *_REORDERS):
                edit.replace(node, node.all_input_nodes[0])
            elif is_call(node, *_VIEWS):
                edit.become(node, aten.reshape.default, node.kwargs["self"], node.kwargs["size"])
            elif is_call(node, aten.view_as_complex.default):  # takes pairs that lie beside each other
                value = node.all_input_nodes[0]
                edit.reread(node, value, edit.insert(node, aten.contiguous.default, value, like=value))
        for item in program.input(Role.SAMPLE):
            if len(item.type.shape) == 4:
                sample = program.node(item.name)
                first = next(n for n in program.nodes() if n.op not in ("placeholder", "get_attr"))
                inside = edit.insert(first, ours.channels_last.default, sample, name=f"{item.name}_nhwc")
                for user in [u for u in sample.users if not is_call(u, ours.channels_last.default, aten.sym_size.int)]:
                    edit.reread(user, sample, inside)
        output = next(n for n in program.nodes() if n.op == "output")
        for value in output.all_input_nodes:
            type_, done = program.tensor_type(value), is_call(value, ours.plain.default)
            if type_ is not None and type_.dtype.is_floating_point and is_call(value) and not done:
                edit.reread(output, value, edit.insert(output, ours.plain.default, value, like=value))
        program.prune()
