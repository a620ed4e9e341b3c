"""The interface of instruments, and the verifier between passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from tfqc.ir.program import Program
from tfqc.ir.verify import Typed, verify
from tfqc.passing.base import Pass
from tfqc.passing.context import Context
from tfqc.passing.remarks import Remark


class Passes(Protocol):
    """A pipeline, as instruments see it; its `str` is its text."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """In order."""
        ...


class Instrument:
    """Sees the program before and after each pass. Methods do nothing unless overridden."""

    def start(self, program: Program, pipeline: Passes) -> None:
        """Before the first pass. An error raised here refuses the run."""

    def before(self, program: Program, item: Pass, number: int) -> None:
        """Before pass `number` (from 1)."""

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        """After a pass; `previous` is the program as it was before."""

    def failed(
        self, program: Program, item: Pass, number: int, pipeline: Passes, ctx: Context, error: Exception
    ) -> list[str]:
        """After a pass failed; `program` is as it was before it. Returns notes for the error."""
        return []

    def said(self, remarks: Sequence[Remark]) -> None:
        """Everything that has been said so far: when the run ends, and again by who has something to add."""

    def finish(self, program: Program) -> None:
        """After the last pass that ran, whether it failed or not."""


class VerifyEach(Instrument):
    """Checks the program's invariants before the first pass and after each.

    level: `full`; `fast` leaves out that every operation gives the type that is declared.
    """

    def __init__(self, level: Literal["full", "fast"] = "full") -> None:
        self.types = level == "full"
        self.typed: Typed = {}

    def start(self, program: Program, pipeline: Passes) -> None:
        verify(program, types=self.types, typed=self.typed)

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        verify(program, f"#{number} {item.name}", types=self.types, typed=self.typed)
