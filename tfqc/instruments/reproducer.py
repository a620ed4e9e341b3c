"""A directory that replays a failure: the program before the pass, the pass, the data and the command."""

from __future__ import annotations

import shlex
from pathlib import Path

from tfqc.instruments.written import check, clear, remember, write
from tfqc.ir.program import Program
from tfqc.ir.rows import QuantPlan
from tfqc.ir.store import save_program
from tfqc.passing.base import Pass
from tfqc.passing.context import Context
from tfqc.passing.instrument import Instrument, Passes


class Reproducer(Instrument):
    """Writes a directory for `tfqc opt` when a pass fails.

    `before.ir` and `before.safetensors` are the program before the pass, `pass.txt` is the pass, and
    `command.txt` runs it; `schedule.json`, `plan.txt` and `calibration.safetensors` are there if there was such data.
    `pipeline.txt` and `error.txt` tell what happened.

    Raises:
        TfqcError: the directory holds files that are no reproducer, or that have been changed; nothing has run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self, program: Program, pipeline: Passes) -> None:
        if self.directory.exists():
            check(self.directory, "reproducer")

    def failed(
        self, program: Program, item: Pass, number: int, pipeline: Passes, ctx: Context, error: Exception
    ) -> list[str]:
        clear(self.directory, "reproducer")
        save_program(program, self.directory / "before.ir")
        remember(self.directory, "before.ir", "before.safetensors")
        self._write("pass.txt", f"{item}")
        self._write("pipeline.txt", f"{pipeline}")
        self._write("error.txt", f"{type(error).__name__}: {error}")
        command = ["tfqc", "opt", self._at("before.ir"), "-p", self._at("pass.txt"), "--seed", str(ctx.seed)]
        if ctx.schedule is not None:
            self._write("schedule.json", ctx.schedule.to_json())
            command += ["--schedule", self._at("schedule.json")]
        if ctx.plan and QuantPlan.table not in program.tables:
            self._write("plan.txt", ctx.plan)
            command += ["--plan", self._at("plan.txt")]
        if ctx.calibration is not None and "calibration" in item.contract().data:
            ctx.calibration.save(self.directory / "calibration.safetensors")
            remember(self.directory, "calibration.safetensors")
            command += ["--calibration", self._at("calibration.safetensors")]
        self._write("command.txt", shlex.join(command))
        return [f"replay it with: {shlex.join(command)}"]

    def _at(self, name: str) -> str:
        return str(self.directory / name)

    def _write(self, name: str, text: str) -> None:
        write(self.directory, name, text + "\n")
