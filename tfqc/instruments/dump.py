"""IR dumps: a numbered file for each pass that changed something, or text on a stream."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tfqc.errors import TfqcError, suggest
from tfqc.instruments.base import Instrument
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.passing import Pass

if TYPE_CHECKING:
    from tfqc.pipeline import Pipeline

_OURS = re.compile(r"\d\d-[\w\-]+\.ir|pipeline\.txt|timing\.json|reproducer")


class DumpIR(Instrument):
    """Writes `00-capture.ir`, `NN-<pass>.ir` for each pass that changed the program, and `pipeline.txt`.

    Earlier dumps in the directory are replaced.

    Raises:
        TfqcError: the directory holds files that are no dumps.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.last = ""

    def start(self, program: Program, pipeline: Pipeline) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        present = list(self.directory.iterdir())
        if foreign := sorted(f.name for f in present if not _OURS.fullmatch(f.name)):
            raise TfqcError(f"{self.directory} holds {foreign[0]!r}, which is no IR dump: choose another directory.")
        for file in present:
            if file.suffix == ".ir":
                file.unlink()
        (self.directory / "pipeline.txt").write_text(f"{pipeline}\n")
        self.last = render(program)
        (self.directory / f"00-{'capture' if program.stage == 0 else 'input'}.ir").write_text(self.last)

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        text = render(program)
        if text != self.last:
            (self.directory / f"{number:02d}-{item.name}.ir").write_text(text)
        self.last = text


class PrintIR(Instrument):
    """Prints the program after one pass (`which` is its name), after every pass (`all`), or after each that changed it
    (`change`)."""

    def __init__(self, which: str, stream: TextIO | None = None) -> None:
        self.which, self.stream = which, stream
        self.last = ""

    def start(self, program: Program, pipeline: Pipeline) -> None:
        names = ["all", "change", *dict.fromkeys(p.name for p in pipeline.passes)]
        if self.which not in names:
            raise TfqcError(f"--print-ir-after={self.which}: no such pass in the pipeline.{suggest(self.which, names)}")
        self.last = render(program)

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        text = render(program)
        if self.which in ("all", item.name) or (self.which == "change" and text != self.last):
            print(f"// after #{number} {item}", text, sep="\n", file=self.stream or sys.stdout)
        self.last = text
