"""What needs a process of its own: start-up, `python -m tfqc`, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.conftest import TINY

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS, BATCHES = 100, 12
MANY = ("--steps", STEPS, "--calibration-images", 16 * BATCHES)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tfqc", *map(str, arguments)]
    # Where the tests run in the background of a shell, children would inherit that Ctrl-C is ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = "import sys, tfqc.cli; print([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, text=True, capture_output=True, check=True)
    assert found.stdout == "[]\n"
    process = start("--version")
    assert process.communicate()[0].startswith("tfqc 0.")


def test_every_public_name_is_found_where_it_is_said_to_be() -> None:
    code = "import tfqc; print([n for n in tfqc.__all__ if getattr(tfqc, n).__name__ != n], callable(tfqc.capture))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, text=True, capture_output=True, check=True)
    assert found.stdout == "[] True\n"


def test_ctrl_c_during_calibration_keeps_what_was_finished(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    process = start("compile", TINY, *MANY, "--out", out)
    deadline = time.monotonic() + 300
    while len(list(work.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=300)
    assert (process.returncode, printed) == (130, "")
    kept = {p.name: p.stat().st_mtime_ns for p in work.iterdir()}
    assert 2 <= len(kept) < BATCHES
    assert said.splitlines()[-1].startswith(f"Interrupted. Kept {len(kept)} finished batches of calibration")
    assert "the same command goes on from there" in said
    assert not out.exists()

    again = start("compile", TINY, *MANY, "--out", out)
    printed, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"found {len(kept)} of {BATCHES} batches of calibration trajectories" in said
    assert f"sampling calibration images in full precision: {STEPS * BATCHES} in" in said
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
