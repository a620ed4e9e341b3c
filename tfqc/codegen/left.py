"""Which pass left an operation in a lowered program."""

from __future__ import annotations

from torch import fx

from tfqc.ir.program import Program
from tfqc.passing.base import Pass
from tfqc.passing.instrument import Instrument, Passes


class MadeBy(Instrument):
    """Remembers after which pass each operation stood where it stands."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, object], str] = {}

    def start(self, program: Program, pipeline: Passes) -> None:
        self._note(program, "")

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        self._note(program, f"#{number} {item.name}")

    def _note(self, program: Program, label: str) -> None:
        for graph in program.functions.values():
            for node in graph.nodes:
                if node.op == "call_function":
                    self._made.setdefault((node.name, node.target), label)

    def of(self, node: fx.Node) -> str:
        """Words for who left a node; they fit behind a reason."""
        label = self._made.get((node.name, node.target), "")
        return f"{label} left it" if label else "it was captured so, and no pass lowered it"
