"""The working directory beside an output: kept when a command is stopped, removed when it is done."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_TRAJECTORY = r"trajectory-[0-9a-f]+-\d+\.safetensors"
_WHOLE = rf"{_TRAJECTORY}|observed-[0-9a-f]+-[0-9a-f]+\.safetensors|rounded-[0-9a-f]+\.safetensors"
_PART = rf"\.({_WHOLE})\.part\d+-[0-9a-f]{{8}}"
_OURS = rf"{_WHOLE}|{_PART}"


def beside(output: Path, suffix: str) -> Path:
    """`out/model` -> `out/model.work`."""
    if output.name in ("", ".."):
        output = output.resolve()
    return output.with_name(f"{output.name}.{suffix}")


@contextmanager
def kept_work(directory: Path) -> Generator[Path]:
    """Trajectories, what is observed on them and rounded weights live here; an exception notes what was kept.

    Commands of the same output share it: the last of them to end removes it.

    Raises:
        TfqcError: the directory holds something else.
    """
    handle = _shared(directory)
    try:
        yield directory
    except BaseException as error:
        if _alone(handle):
            _remove(directory, _PART)
        if kept := len(_present(directory, _TRAJECTORY)):
            batches = f"{kept} finished batch{'es' if kept > 1 else ''}"
            error.add_note(
                f"Kept {batches} of calibration trajectories in {directory}: the same command goes on from there."
            )
        raise
    else:
        if _alone(handle):
            _remove(directory, _OURS)
    finally:
        os.close(handle)


def _shared(directory: Path) -> int:
    """The directory, made if need be, and held until the handle is closed."""
    from tfqc.files.claim import claim

    while True:
        with suppress(FileNotFoundError):  # another command has just ended and removed it: make it again
            if not claim(directory, _OURS, "calibration trajectory"):
                directory.chmod(0o700)  # images can be made from what will be there
            handle = os.open(directory, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_SH)
            if directory.exists() and os.path.samestat(os.fstat(handle), directory.stat()):
                return handle
            os.close(handle)


def _alone(handle: int) -> bool:
    """True if no other command holds the directory; none can begin to before the handle is closed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _present(directory: Path, names: str) -> list[Path]:
    with suppress(FileNotFoundError):  # a user has removed it
        return [file for file in directory.iterdir() if re.fullmatch(names, file.name) and not file.is_dir()]
    return []


def _remove(directory: Path, names: str) -> None:
    for file in _present(directory, names):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or has gone
        directory.rmdir()
