"""A directory that replays a failure: the program before the pass, the pass, the data and the command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tfqc.instruments.base import Instrument, claim
from tfqc.ir.program import Program
from tfqc.ir.store import save_program
from tfqc.passing import Context, Pass

if TYPE_CHECKING:
    from tfqc.pipeline import Pipeline

_OURS = r"before\.(ir|safetensors)|(pass|pipeline|error|command)\.txt|schedule\.json|calibration\.safetensors"
_SIGN = r"before\.ir"


class Reproducer(Instrument):
    """Writes a directory for `tfqc opt` when a pass fails.

    `before.ir` and `before.safetensors` are the program before the pass, `pass.txt` is the pass, and
    `command.txt` runs it; `schedule.json` and `calibration.safetensors` are there if there was such data.
    `pipeline.txt` and `error.txt` tell what happened.

    Raises:
        TfqcError: the directory holds files that are no reproducer; nothing has run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self, program: Program, pipeline: Pipeline) -> None:
        if self.directory.exists():
            claim(self.directory, _OURS, "reproducer", _SIGN)

    def failed(
        self, program: Program, item: Pass, number: int, pipeline: Pipeline, ctx: Context, error: Exception
    ) -> list[str]:
        for file in claim(self.directory, _OURS, "reproducer", _SIGN):
            if file.name != "before.ir":  # it says whose the others are, and is written anew
                file.unlink()
        save_program(program, self.directory / "before.ir")
        self._write("pass.txt", f"{item}")
        self._write("pipeline.txt", f"{pipeline}")
        self._write("error.txt", f"{type(error).__name__}: {error}")
        command = ["tfqc", "opt", self._at("before.ir"), "-p", self._at("pass.txt"), "--seed", str(ctx.seed)]
        if ctx.schedule is not None:
            self._write("schedule.json", ctx.schedule.to_json())
            command += ["--schedule", self._at("schedule.json")]
        if ctx.calibration is not None and "calibration" in item.contract().data:
            ctx.calibration.save(self.directory / "calibration.safetensors")
            command += ["--calibration", self._at("calibration.safetensors")]
        self._write("command.txt", shlex.join(command))
        return [f"replay it with: {shlex.join(command)}"]

    def _at(self, name: str) -> str:
        return str(self.directory / name)

    def _write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text + "\n")
