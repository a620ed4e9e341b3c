"""The user's cache: what is broken is made again, code comes from private directories alone, and it stays small."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Called
from tests.killing import killed
from tfqc.cli import app
from tfqc.runtime import cache, pruning
from tfqc.runtime.cache import cache_directory, cache_root
from tfqc.runtime.kept import kept

ROOT = Path(__file__).parents[2]
BYTES = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TFQC_CACHE_LIMIT", raising=False)
    monkeypatch.delenv("TFQC_CACHE_DAYS", raising=False)
    return tmp_path


class Maker:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> None:
        self.times += 1
        path.with_suffix(".o").write_text("on the way")
        path.write_bytes(BYTES)


def test_made_once_and_private() -> None:
    make = Maker()
    for _ in range(3):
        file = kept(["a", "b"], ".so", make)
        assert file.read_bytes() == BYTES and file.suffix == ".so"
    assert make.times == 1
    assert kept(["a", "c"], ".so", make) != file and kept(["a", "b"], ".o", make) != file
    assert kept(["a", "b"], ".so", make, "modules").parent == cache_directory("modules")
    assert make.times == 4
    for directory in (cache.cache_root(), cache_directory(), cache_directory("modules")):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert len(list(cache_directory().iterdir())) == 3


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def linked(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


@pytest.mark.parametrize(
    "damage",
    [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(BYTES[:-1]), flipped, linked, Path.unlink],
)
def test_what_is_broken_is_made_again(damage: Callable[[Path], Any]) -> None:
    make = Maker()
    damage(kept(["a"], ".so", make))
    again = kept(["a"], ".so", make)
    assert again.read_bytes() == BYTES and not again.is_symlink() and make.times == 2


def test_a_failure_leaves_nothing() -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match=r"no compiler"):
        kept(["a"], ".so", fail)
    assert list(cache_directory().iterdir()) == []


@pytest.mark.parametrize("which", ["tfqc", "tfqc/kernels"])
def test_a_directory_that_others_can_write_is_not_used(which: str, home: Path) -> None:
    kept([which], ".so", Maker())
    (home / which).chmod(0o777)
    make = Maker()
    file = kept([which], ".so", make)
    assert make.times == 1 and home not in file.parents
    assert file.parent.parent.stat().st_mode & 0o777 == 0o700
    (home / which).chmod(0o755)  # as an earlier version made it
    assert home in kept([which], ".so", make).parents and make.times == 1
    assert (home / which).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("which", ["tfqc", "tfqc/kernels"])
def test_a_directory_of_somebody_else_is_not_used(which: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept([which, "theirs"], ".so", Maker())
    other, lstat = home / which, Path.lstat

    def theirs(self: Path) -> Any:
        found = lstat(self)
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:10]]) if self == other else found

    monkeypatch.setattr(Path, "lstat", theirs)
    assert home not in kept([which, "theirs"], ".so", Maker()).parents


def test_a_link_in_place_of_the_directory_is_not_used(home: Path) -> None:
    (home / "elsewhere").mkdir()
    (home / "tfqc").symlink_to(home / "elsewhere")
    assert home not in kept(["a"], ".so", Maker()).parents
    assert list((home / "elsewhere").iterdir()) == []


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert cache.cache_root() == home / "tfqc"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.cache_root() == Path.home() / ".cache" / "tfqc"


def test_killed_while_it_is_made() -> None:
    def make(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for at in range(0, len(BYTES), 1024):
                file.write(BYTES[at : at + 1024])

    def make_for_ever() -> None:
        number = 0
        while True:
            number += 1
            kept([str(number % 50)], ".so", make)
            for file in cache_directory().glob("*.so") if number % 50 == 0 else ():
                file.unlink()

    for number in range(20):
        killed(make_for_ever, number)
    files = list(cache_directory().glob("*.so"))
    assert all(file.read_bytes() == BYTES for file in files)
    kept(["last"], ".so", make)
    assert [p for p in cache_directory().iterdir() if p.suffix != ".so"] == []


def test_three_at_once(home: Path) -> None:
    script = """
import sys, time
from tfqc.runtime.kept import kept
def make(path):
    path.write_bytes(bytes(100))
    time.sleep(0.2)
    path.write_bytes(repr(time.time_ns()).encode())
sys.stdin.read(1)
print(kept(["a"], ".so", make).read_text())
"""
    start = [sys.executable, "-c", script]
    both = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(start, cwd=ROOT, env=os.environ, **both) for _ in range(3)]  # type: ignore[call-overload]
    for process in processes:
        process.stdin.write("x")
        process.stdin.close()
        process.stdin = None
    (said,) = {process.communicate(timeout=120)[0].strip() for process in processes}
    (file,) = cache_directory().iterdir()
    assert file.read_text() == said != ""


# -- and it stays small -----------------------------------------------------------------------------------------------


def filled(home: Path) -> list[Path]:
    """Six files of 1000 bytes, used 0 to 5 days ago, in a cache that was never looked through."""
    files: list[Path] = []
    for days in range(6):
        kind = pruning.KINDS[days % 3]
        file = kept([f"{days}"], ".x", lambda path: path.write_bytes(bytes(1000)), kind)  # type: ignore[arg-type, return-value]
        os.utime(file, (time.time() - days * 86400 - 7200,) * 2)
        files.append(file)
    (cache_directory() / "notes.txt").write_text("mine")
    (cache_root() / pruning.LOOKED).unlink()
    return files


@pytest.mark.parametrize(
    ("limit", "days", "left"),
    [(None, None, 6), (1 << 40, 3, 3), (2500, None, 2), (2500, 1, 1), (0, None, 0), (None, 0, 0)],
)
def test_pruned(limit: int | None, days: float | None, left: int, home: Path) -> None:
    files = filled(home)
    removed = pruning.prune(limit, days)
    assert [f.exists() for f in files] == [True] * left + [False] * (6 - left)
    assert len(removed) == 6 - left and (cache_directory() / "notes.txt").exists()


def test_pruned_as_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = filled(home)
    monkeypatch.setenv("TFQC_CACHE_LIMIT", "4K")
    monkeypatch.setenv("TFQC_CACHE_DAYS", "no number")
    kept(["new"], ".so", lambda path: path.write_bytes(bytes(10)))  # type: ignore[arg-type, return-value]
    assert [f.exists() for f in files] == [True] * 4 + [False] * 2


def test_looked_through_at_times_and_not_for_every_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = filled(home)
    kept(["new"], ".so", lambda path: path.write_bytes(bytes(10)))  # type: ignore[arg-type, return-value]
    monkeypatch.setenv("TFQC_CACHE_LIMIT", "0")
    kept(["newer"], ".so", lambda path: path.write_bytes(bytes(10)))  # type: ignore[arg-type, return-value]
    assert all(f.exists() for f in files)
    os.utime(cache_root() / pruning.LOOKED, (time.time() - pruning.EVERY,) * 2)
    kept(["newest"], ".so", lambda path: path.write_bytes(bytes(10)))  # type: ignore[arg-type, return-value]
    assert not any(f.exists() for f in files)


def test_what_is_in_use_stays(home: Path) -> None:
    files = filled(home)
    assert kept(["5"], ".x", lambda path: None, pruning.KINDS[2]) == files[5]  # used now
    pruning.prune(0)
    assert [f.exists() for f in files] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("12", 12), ("3k", 3072), ("1.5G", 3 << 29), ("2 MiB", 2 << 20), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert pruning.size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1e3", "G", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size"):
        pruning.size(text)


def test_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    def tfqc(*arguments: str) -> Called:
        result = CliRunner().invoke(app, ["cache", *arguments])
        return Called(result.exit_code, result.stdout, result.stderr)

    files = filled(home)
    listed = tfqc("ls", "--json").json
    assert [entry["name"] for entry in listed["entries"]] == [f.name for f in files] and listed["bytes"] == 6000
    assert "6.00 kB" in tfqc("ls").out and files[0].name in tfqc("ls").out
    assert tfqc("clean", "--days", "4", "--json").json["removed"] == 2
    assert tfqc("clean", "--limit", "3K", "--json").json == {"directory": str(home / "tfqc"), "removed": 1,
                                                             "bytes": 1000}  # fmt: skip
    assert "--limit: 'much' is no size" in tfqc("clean", "--limit", "much").err
    assert "3 removed, 3.00 kB" in tfqc("clean").out
    assert tfqc("ls", "--json").json["entries"] == [] and (cache_directory() / "notes.txt").exists()
