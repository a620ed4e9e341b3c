"""channels-last: images lie in memory with their channels next to each other, from the first operation to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.analysis.rewrite import name_of
from tfqc.ir.program import Program, Role, Stage
from tfqc.passing import EXACT, Context, Numerics, Pass

_REORDERS = {"aten.contiguous.default", "aten.clone.default"}
# Refuse what lies in memory in another order than their shape says; reshape does not.
_VIEWS = {"aten.view.default", "aten._unsafe_view.default"}


@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Reorder the sample once on its way in and the outputs once on their way out, and nothing in between."""

    name: ClassVar[str] = "channels-last"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = EXACT

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        ours = torch.ops.tfqc
        for node in program.nodes():
            if name_of(node) in _REORDERS and isinstance(node.args[0], fx.Node):
                program.replace(node, node.args[0])
            elif name_of(node) in _VIEWS:
                node.target = torch.ops.aten.reshape.default
        for item in program.input(Role.SAMPLE):
            if len(item.type.shape) == 4:
                sample = program.node(item.name)
                first = next(n for n in program.nodes() if n.op not in ("placeholder", "get_attr"))
                inside = program.insert(first, ours.channels_last.default, (sample,), name=f"{item.name}_nhwc")
                for user in [u for u in sample.users if u is not inside and name_of(u) != "aten.sym_size.int"]:
                    user.replace_input_with(sample, inside)
        output = next(n for n in program.nodes() if n.op == "output")
        for value in output.all_input_nodes:
            if program.tensor_type(value) is not None and value.op == "call_function":
                output.replace_input_with(value, program.insert(output, ours.plain.default, (value,), like=value))
        program.prune()
