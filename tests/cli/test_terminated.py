"""SIGTERM ends a command as Ctrl-C does: what it had begun to write is taken away."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import typer

from tfqc.cli.output import guarded
from tfqc.files.storage import replacing


def test_a_file_that_was_begun_is_taken_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        with replacing(tmp_path / "file.pt2") as part:
            part.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 143 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "Interrupted. Nothing was written.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_who_has_an_eye_on_it_keeps_it() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        guarded(lambda: os.kill(os.getpid(), signal.SIGTERM))()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
