"""A directory that replays a failure: the program before the pass, its tensors, the pass, the data, the command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tfqc.instruments.base import Instrument
from tfqc.ir.program import Program
from tfqc.ir.store import save_program
from tfqc.passing import Context, Pass

if TYPE_CHECKING:
    from tfqc.pipeline import Pipeline


class Reproducer(Instrument):
    """Writes `before.ir`, `before.safetensors`, `pass.txt`, `pipeline.txt`, `error.txt` and `command.txt` when a pass
    fails (and `calibration/`, if the pass uses calibration data), for `tfqc opt`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def failed(
        self, program: Program, item: Pass, number: int, pipeline: Pipeline, ctx: Context, error: Exception
    ) -> list[str]:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        save_program(program, self.directory / "before.ir")
        (self.directory / "pass.txt").write_text(f"{item}\n")
        (self.directory / "pipeline.txt").write_text(f"{pipeline}\n")
        (self.directory / "error.txt").write_text(f"{type(error).__name__}: {error}\n")
        command = f"tfqc opt {self.directory / 'before.ir'} -p {self.directory / 'pass.txt'}"
        if ctx.schedule is not None:
            (self.directory / "schedule.json").write_text(ctx.schedule.to_json())
            command += f" --schedule {self.directory / 'schedule.json'}"
        if ctx.calibration is not None and "calibration" in item.data:
            ctx.calibration.save(self.directory / "calibration.safetensors")
            command += f" --calibration {self.directory / 'calibration.safetensors'}"
        (self.directory / "command.txt").write_text(command + "\n")
        return [f"replay it with: {command}"]
