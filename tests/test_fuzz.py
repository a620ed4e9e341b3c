"""A short run of `bench/fuzz.py`: nothing but TfqcError escapes, and nothing outside the work directory is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_few_thousand_inputs(tmp_path: Path) -> None:
    """In a process of its own: an audit hook cannot be taken off."""
    command = [sys.executable, "bench/fuzz.py", "--inputs", "2500", "--seed", "7", "--json", str(tmp_path / "f.json")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "f.json").read_text())["targets"]
    assert all(row["accepted"] and row["refused"] and not row["raw"] for row in rows.values())


WATCHED = """
import sys, os
from pathlib import Path
from bench.fuzzing import Forbidden, Watch
watch = Watch(Path(sys.argv[1]), ["os"])
watch.on = True
try:
    {what}
except Forbidden as error:
    print("forbidden", error)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("open('/tmp/tfqc-no-such-file', 'w')", "forbidden open of '/tmp/tfqc-no-such-file' for writing"),
        ("os.system('true')", "forbidden os.system"),
        ("import antigravity", "forbidden import of antigravity"),
        ("exec('1')", "forbidden exec of text"),
        ("open(sys.argv[1] + '/x', 'w').close()", ""),
    ],
)
def test_the_watch_sees(what: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WATCHED.format(what=what), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.startswith(said), done
    assert bool(done.stdout) == bool(said), done
