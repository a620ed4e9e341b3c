"""The interface of instruments, and the verifier between passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfqc.ir.program import Program
from tfqc.ir.verify import verify
from tfqc.passing import Context, Pass

if TYPE_CHECKING:
    from tfqc.pipeline import Pipeline


class Instrument:
    """Sees the program before and after each pass. Methods do nothing unless overridden."""

    def start(self, program: Program, pipeline: Pipeline) -> None:
        """Before the first pass."""

    def before(self, program: Program, item: Pass, number: int) -> None:
        """Before pass `number` (from 1)."""

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        """After a pass; `previous` is the program as it was before."""

    def failed(
        self, program: Program, item: Pass, number: int, pipeline: Pipeline, ctx: Context, error: Exception
    ) -> list[str]:
        """After a pass failed; `program` is as it was before it. Returns notes for the error."""
        return []

    def finish(self, program: Program) -> None:
        """After the last pass."""


class VerifyEach(Instrument):
    """Checks the program's invariants before the first pass and after each."""

    def start(self, program: Program, pipeline: Pipeline) -> None:
        verify(program)

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        verify(program, f"#{number} {item.name}")
