"""SIGTERM ends a command as Ctrl-C does: what it had begun to write is taken away.

Each runs in a process of its own, as commands do: what else has an eye on this one's signals is not known.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BEGINNING = """
import os, signal, sys, time
from pathlib import Path
from tfqc.cli.output import guarded
from tfqc.files.storage import replacing
signal.signal(signal.SIGTERM, signal.SIG_DFL)
"""
_BEGUN = """
@guarded
def command():
    with replacing(Path(sys.argv[1]) / "file.pt2") as part:
        part.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
try:
    command()
except BaseException as ended:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    sys.exit(ended.exit_code)
"""
_SEEN = """
signal.signal(signal.SIGTERM, lambda number, frame: print("seen", number))
guarded(lambda: os.kill(os.getpid(), signal.SIGTERM))()
"""


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _BEGINNING + program, *arguments], capture_output=True, text=True)


def test_a_file_that_was_begun_is_taken_away(tmp_path: Path) -> None:
    ended = _run(_BEGUN, str(tmp_path))
    assert (ended.returncode, ended.stderr) == (143, "Interrupted. Nothing was written.\n")
    assert not list(tmp_path.iterdir())


def test_who_has_an_eye_on_it_keeps_it() -> None:
    ended = _run(_SEEN)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "seen 15\n", "")
