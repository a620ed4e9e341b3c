"""The READMEs as a reader would follow them: files copied, commands run, and what comes out is what stands there."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A file is a block behind a line that begins with its name; commands and what they print are a console block.
FILE = re.compile(r"^`([\w./]+)`[^\n]*:\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ", re.MULTILINE)


def follow(readme: str, directory: Path) -> list[tuple[str, str, str]]:
    """Write a README's files, run its commands in order: of each, what it should print and what it prints."""
    for name, content in FILE.findall(readme):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    site = directory.parent / "site"  # what pip installs goes here, from here alone
    env = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
        "PIP_TARGET": str(site), "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which pip reads as --no-build-isolation
        "COLUMNS": "120", "TERM": "dumb", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(directory.parent / "cache"),
    }  # fmt: skip
    found: list[tuple[str, str, str]] = []
    for block in CONSOLE.findall(readme):
        for step in COMMAND.split(block)[1:]:
            command, _, wanted = step.partition("\n")
            done = subprocess.run(
                ["bash", "-c", command],
                capture_output=True,
                text=True,
                env=os.environ | env,
                cwd=directory,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            found.append((command, wanted, done.stdout + done.stderr))
    return found


def agrees(wanted: str, printed: str) -> bool:
    """True if a command prints what the README shows; `...` stands for anything, blanks count as one."""
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(wanted, printed, options)


@pytest.mark.parametrize("name", ["passes/README.md", "backends/README.md"])
def test_a_reader_gets_what_it_says(name: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    steps = follow((ROOT / name).read_text(), work)
    assert [command.split()[0] for command, _, _ in steps][:2] == ["pip", "tfqc"]
    for command, wanted, printed in steps:
        assert agrees(wanted, printed), f"{command} prints\n{printed}"


def test_what_is_not_said_is_noticed(tmp_path: Path) -> None:
    readme = "`a/b.txt`, a file:\n\n```\none\n```\n\n```console\n$ cat a/b.txt\none\n$ echo two three\nthree\n```\n"
    (cat, echo) = follow(readme, tmp_path)
    assert agrees(*cat[1:]) and not agrees(*echo[1:])
    assert agrees("t... three\n", echo[2])
