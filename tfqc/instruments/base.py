"""The interface of instruments, and the verifier between passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tfqc.errors import TfqcError
from tfqc.ir.program import Program
from tfqc.ir.verify import verify
from tfqc.passing import Context, Pass

if TYPE_CHECKING:
    from tfqc.pipeline import Pipeline


class Instrument:
    """Sees the program before and after each pass. Methods do nothing unless overridden."""

    def start(self, program: Program, pipeline: Pipeline) -> None:
        """Before the first pass. An error raised here refuses the run."""

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
        """After the last pass that ran, whether it failed or not."""


class VerifyEach(Instrument):
    """Checks the program's invariants before the first pass and after each."""

    def start(self, program: Program, pipeline: Pipeline) -> None:
        verify(program)

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        verify(program, f"#{number} {item.name}")


def claim(directory: Path, ours: str, what: str, sign: str = "") -> list[Path]:
    """Make a directory, or make sure that it holds nothing but what an earlier run wrote there.

    Args:
        ours: a pattern of the names that a run writes; links are never ours.
        sign: a pattern of the one that tells it from a directory in which somebody keeps files of such names: every
            run writes it first. Without it, the names alone tell.

    Returns:
        What is there.

    Raises:
        TfqcError: the directory holds something else, or is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise TfqcError(f"{directory} is a file: choose a directory for the {what}.")
    directory.mkdir(parents=True, exist_ok=True)
    present = sorted(directory.iterdir())
    foreign = [file.name for file in present if not re.fullmatch(ours, file.name) or file.is_symlink()]
    if sign and not any(re.fullmatch(sign, file.name) for file in present):
        foreign += [file.name for file in present if not file.is_dir()]
    if foreign:
        raise TfqcError(f"{directory} holds {foreign[0]!r}, which is no {what}: choose another directory.")
    return present
