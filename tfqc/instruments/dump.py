"""IR dumps: a numbered file for each pass that changed something, or text on a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tfqc.errors import TfqcError, suggest
from tfqc.instruments.written import clear, write
from tfqc.ir.program import Program, Stage
from tfqc.ir.render import render
from tfqc.passing.base import Pass
from tfqc.passing.instrument import Instrument, Passes
from tfqc.passing.remarks import Remark


class DumpIR(Instrument):
    """Writes `00-capture.ir`, `NN-<pass>.ir` for each pass that changed the program, `pipeline.txt`, `remarks.json`.

    The dumps and timings of an earlier run are removed. (`.written.json` says which they are.)

    Raises:
        TfqcError: the directory holds other files, or one that has been changed since; nothing is removed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self, program: Program, pipeline: Passes) -> None:
        clear(self.directory, "IR dump")
        first = "capture" if program.stage is Stage.CAPTURED else "input"
        write(self.directory, f"00-{first}.ir", render(program))
        write(self.directory, "pipeline.txt", f"{pipeline}\n")

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        text = render(program)
        if text != render(previous):
            write(self.directory, f"{number:02d}-{item.name}.ir", text)

    def said(self, remarks: Sequence[Remark]) -> None:
        write(self.directory, "remarks.json", json.dumps([r.to_json() for r in remarks], indent=1) + "\n")


class PrintIR(Instrument):
    """Prints the program after passes called `which`, after every pass (`all`), or after each that changed it
    (`change`).

    Raises:
        TfqcError: the pipeline has no such pass.
    """

    def __init__(self, which: str, stream: TextIO | None = None) -> None:
        self.which, self.stream = which, stream

    def start(self, program: Program, pipeline: Passes) -> None:
        names = ["all", "change", *dict.fromkeys(p.name for p in pipeline.passes)]
        if self.which not in names:
            raise TfqcError(f"--print-ir-after={self.which}: no such pass in the pipeline.{suggest(self.which, names)}")

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        text = render(program)
        if self.which in ("all", item.name) or (self.which == "change" and text != render(previous)):
            print(f"// after #{number} {item}", text, sep="\n", file=self.stream or sys.stdout)
