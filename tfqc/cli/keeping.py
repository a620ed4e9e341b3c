"""The working directory beside an output: kept when a command is stopped, removed when it is done."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_PART = r"\.trajectory-[0-9a-f]+-\d+\.safetensors\.part\d+-[0-9a-f]{8}"
_OURS = rf"trajectory-[0-9a-f]+-\d+\.safetensors|{_PART}"


def beside(output: Path, suffix: str) -> Path:
    """`out/model` -> `out/model.work`."""
    if output.name in ("", ".."):
        output = output.resolve()
    return output.with_name(f"{output.name}.{suffix}")


@contextmanager
def kept_work(directory: Path) -> Generator[Path]:
    """Calibration trajectories live here; an exception gets a note that says what was kept.

    Raises:
        TfqcError: the directory holds something else.
    """
    from tfqc.instruments.base import claim

    if not claim(directory, _OURS, "calibration trajectory"):
        directory.chmod(0o700)  # images can be made from what will be there
    try:
        yield directory
    except BaseException as error:
        for file in directory.iterdir():
            if re.fullmatch(_PART, file.name):
                file.unlink()
        kept = sum(1 for _ in directory.iterdir())
        if kept:
            batches = f"{kept} finished batch{'es' if kept > 1 else ''}"
            error.add_note(
                f"Kept {batches} of calibration trajectories in {directory}: the same command goes on from there."
            )
        else:
            directory.rmdir()
        raise
    for file in directory.iterdir():
        if re.fullmatch(_OURS, file.name) and not file.is_dir():
            file.unlink()
    with suppress(OSError):  # somebody has put something else there
        directory.rmdir()
