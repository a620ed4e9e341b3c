"""Artifacts on disk: whole or refused, and never lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.killing import killed
from tfqc.codegen import placing
from tfqc.codegen.artifact import MANIFEST, VERSION, Artifact, check_files, check_output, read_manifest
from tfqc.errors import ArtifactError
from tfqc.runtime import VERSION as RUNTIME

NAMES = ("model.py", "program.ir", "weights.safetensors")


def make(value: float = 1.0, **facts: Any) -> Artifact:
    tensors = {"w": torch.full((2, 2), value), "empty": torch.empty(0), "view": torch.arange(6).reshape(2, 3).T}
    facts = {"backend": "none", **facts}
    return Artifact({"model.py": "x = 1\n", "program.ir": "é\n"}, {"weights.safetensors": tensors}, facts)


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def edit(directory: Path, **changes: Any) -> None:
    """Change a manifest; None takes a field away."""
    manifest = json.loads((directory / MANIFEST).read_text()) | changes
    (directory / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_saved_bytes_are_those_of_the_manifest(tmp_path: Path) -> None:
    out = make().save(tmp_path / "deep" / "out")
    manifest = check_files(out)
    assert set(manifest["files"]) == set(NAMES)
    assert manifest["files"]["model.py"]["bytes"] == 6
    assert manifest["runtime"] == RUNTIME
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert content(out) == make().files() == content(make().save(tmp_path / "again"))


def test_an_older_artifact_is_replaced(tmp_path: Path) -> None:
    make(1).save(tmp_path / "out")
    (tmp_path / "out" / "__pycache__").mkdir()
    (tmp_path / "out" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"code")
    make(2).save(tmp_path / "out")
    check_files(tmp_path / "out")
    assert content(tmp_path / "out") == make(2).files()
    edit(tmp_path / "out", version=1, runtime=None)  # of an earlier release
    make(3).save(tmp_path / "out")
    assert content(tmp_path / "out") == make(3).files()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 1}, r"was written by an earlier tfqc: compile the model again\."),
        ({"version": VERSION + 1, "files": {"program.ir": {"sha256": "0" * 64, "bytes": 0}}, "new": [1]},
         rf"format version {VERSION + 1}, newer than {VERSION}, which this tfqc reads: upgrade tfqc\."),
        ({"runtime": RUNTIME + 1}, rf"needs version {RUNTIME + 1} of tfqc.runtime, this is {RUNTIME}: upgrade tfqc\."),
    ],
)  # fmt: skip
def test_other_versions(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    edit(out, **changes)
    with pytest.raises(ArtifactError, match=sentence):
        check_files(out)


DEEP = '{"a":' * 100 + "1" + "}" * 100


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "1e999", '{"format": "other"}', "\xff\x00", "[" * 100_000, DEEP, '"\\ud800"',
        '{"format": "tfqc-artifact"}', '{"format": "tfqc-artifact", "version": "x", "files": {}}',
    ],
)  # fmt: skip
def test_no_manifest_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=MANIFEST):
        check_files(tmp_path)
    with pytest.raises(ArtifactError, match=MANIFEST):
        make().save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": None}, {"version": None}, {"runtime": None}, {"files": None}, {"files": {}}, {"files": []},
        {"files": list(NAMES)}, {"files": {"program.ir": None}}, {"files": {"program.ir": {"bytes": 3}}},
        {"files": {"program.ir": {"sha256": "0" * 63, "bytes": 3}}},
        {"files": {"program.ir": {"sha256": "0" * 64, "bytes": -1}}},
        {"files": {"program.ir": {"sha256": "0" * 64, "bytes": 1 << 70}}},
        {"files": {"program.ir": {"sha256": "0" * 64, "bytes": 3.0}}},
        {"version": True}, {"version": 2.0}, {"version": float("nan")}, {"version": 0}, {"version": 10**400},
        {"runtime": "1"}, {"runtime": -1}, {"backend": 3}, {"backend": ["fake-quant"]},
        {"inputs": 3}, {"inputs": [{"path": "sample"}]}, {"report": "all well"}, {"report": [{}]},
        {"remarks": ["all well"]}, {"remarks": [{}]},
        {"remarks": [{"pass_name": "p", "kind": "k", "numbers": {"a": []}}]},
        {"schedule": []}, {"schedule": {}}, {"schedule": {"timesteps": [float("nan")], "sampler": {}}},
        {"schedule": {"timesteps": ["1"], "sampler": {}}}, {"calibration": {"images": "many"}}, {"versions": ["1"]},
        {"model": {"a": 1}}, {"more": json.loads(DEEP)},
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape(changes: dict[str, Any], tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    edit(out, **changes)
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} (is|lists|has|holds)") as caught:
        check_files(out)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_field_twice(tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text('{"files": {},' + text[1:])
    with pytest.raises(ArtifactError, match="a name stands there twice"):
        check_files(out)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "a/b", "..", ".", "", "x\0y", MANIFEST, "__pycache__", ".hidden", "a\\b", "a" * 300,
     "\x1b[2J", "model.py "],
)  # fmt: skip
def test_a_manifest_names_files_inside_only(name: str, tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    files = json.loads((out / MANIFEST).read_text())["files"]
    edit(out, files={**files, name: {"sha256": "", "bytes": 0}})
    with pytest.raises(ArtifactError, match=r"is no name for a file of an artifact") as caught:
        check_files(out)
    assert str(caught.value).isprintable() and ascii(name)[1:50] in str(caught.value)
    with pytest.raises(ArtifactError, match=r"is no name for a file of an artifact"):
        Artifact({"program.ir": "", name: "text"}, {}).save(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_just_the_files_of_its_kind(tmp_path: Path) -> None:
    """What a manifest does not list would be read without having been checked."""
    out = make(backend="fake-quant").save(tmp_path / "out")
    check_files(out)
    (out / "time.safetensors").write_bytes(save({}))
    with pytest.raises(ArtifactError, match=r"holds 'time.safetensors', which its manifest.json does not list"):
        check_files(out)
    files = json.loads((out / MANIFEST).read_text())["files"]
    edit(out, files={**files, "time.safetensors": entry(save({}))})
    check_files(out)
    (out / "kernels.cpp").write_text("")
    edit(out, files={**files, "time.safetensors": entry(save({})), "kernels.cpp": entry(b"")})
    with pytest.raises(ArtifactError, match=r"lists 'kernels.cpp', which artifacts of fake-quant do not have"):
        check_files(out)
    for name in ("kernels.cpp", "time.safetensors", "model.py"):
        (out / name).unlink()
    edit(out, files={name: files[name] for name in NAMES if name != "model.py"})
    with pytest.raises(ArtifactError, match=r"is not whole: its manifest.json does not list 'model.py'"):
        check_files(out)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swapped(path: Path) -> None:
    other = path.with_name("program.ir" if path.name != "program.ir" else "model.py")
    path.write_bytes(other.read_bytes())


def linked(path: Path) -> None:
    """The same bytes, elsewhere: what lies there may be changed after it has been checked, or be a secret."""
    outside = path.parents[1] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (truncated, lambda p: p.write_bytes(b""), flipped, swapped, Path.unlink, linked, directory, pipe)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*NAMES, MANIFEST])
def test_damaged_files(damage: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    damage(out / name)
    # A manifest with a flipped bit may name the file of which it says something else now.
    with pytest.raises(ArtifactError, match="out" if damage is flipped else name):
        check_files(out)


def test_damaged_tensors_with_the_right_hash(tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    truncated(out / "weights.safetensors")
    files = json.loads((out / MANIFEST).read_text())["files"]
    edit(out, files={**files, "weights.safetensors": entry((out / "weights.safetensors").read_bytes())})
    with pytest.raises(ArtifactError, match=r"weights.safetensors is no whole safetensors file"):
        check_files(out)


def test_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("nowhere", "file", "file/below", "x" * 5000, "a\0b", ""):
        with pytest.raises(ArtifactError):
            read_manifest(tmp_path / place)


# -- what is the user's -----------------------------------------------------------------------------------------------


def test_foreign_files_are_safe(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make().save(out)  # an empty directory is free
    (out / "thesis.txt").write_text("years of work")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"holds 'thesis.txt', which is no part of an artifact"):
            make(2).save(out)
        assert (out / "thesis.txt").read_text() == "years of work"
        for name in (MANIFEST, *NAMES):
            (out / name).unlink(missing_ok=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"is a file: choose a directory"):
        make().save(tmp_path / "file")


@pytest.mark.parametrize(
    "manifest",
    [
        {"files": ["notes.txt"]},
        {"files": {"notes.txt": {}}},
        {"format": "tfqc-artifact", "version": 2, "files": ["notes.txt"]},
        {"format": "tfqc-artifact", "version": 2, "files": {"notes.txt": entry(b"mine")}},
        {"format": "tfqc-artifact", "version": 1, "files": {"notes.txt": {}, "program.ir": {}}},
        {"format": "tfqc-artifact", "version": 2, "files": {"program.ir": entry(b"")}},
        {"format": "tfqc-artifact", "version": 2, "runtime": 1,
         "files": {"program.ir": entry(b""), "notes.txt": entry(b"other")}},
    ],
)  # fmt: skip
def test_somebodys_manifest(manifest: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / MANIFEST).write_text(json.dumps(manifest))
    before = content(out)
    for check in (check_output, make().save):
        with pytest.raises(ArtifactError, match=r"choose another directory"):
            check(out)
    assert content(out) == before


@pytest.mark.parametrize("place", ["model.py", "__pycache__/notes.txt", "__pycache__/other.cpython-311.pyc", "more/x"])
def test_what_was_edited_or_added_is_safe(place: str, tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("my own")
    with pytest.raises(ArtifactError, match=r"choose another directory"):
        make(2).save(out)
    assert (out / place).read_text() == "my own"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for target in ("disk", "disk/new"):
        (tmp_path / "link").symlink_to(tmp_path / target)
        for value in (1, 2):
            make(value).save(tmp_path / "link")
            assert (tmp_path / "link").is_symlink()
            assert content(tmp_path / target) == make(value).files()
            check_files(tmp_path / "link")
        (tmp_path / "link").unlink()
        shutil.rmtree(tmp_path / "disk")
        (tmp_path / "disk").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "out").symlink_to(tmp_path / "thesis.txt")
    for name in ("loop", "out"):
        with pytest.raises(ArtifactError):
            make().save(tmp_path / name)
        assert (tmp_path / name).is_symlink()


def test_the_current_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path):
        with pytest.raises(ArtifactError, match=r"is the current directory: choose one for the artifact alone"):
            make().save(place)
    assert make().save("out") == Path("out")
    assert check_files("out")["backend"] == "none"


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_failure_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, or the renaming fails, at any point."""
    out = make(1).save(tmp_path / "out")
    replace = os.replace
    for fails in (1, 2):
        count = [0]

        def failing(a: Any, b: Any, count: list[int] = count, fails: int = fails) -> None:
            count[0] += 1
            if count[0] == fails:
                raise OSError(errno.EIO, "Input/output error")
            replace(a, b)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(ArtifactError, match=r"out cannot be written: Input/output error\."):
            make(2).save(out)
        monkeypatch.undo()
        assert content(out) == make(1).files()

    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"0123456789")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tfqc.codegen.artifact.save_tensors", full)
    with pytest.raises(ArtifactError, match=r"out cannot be written: No space left on device\."):
        make(2).save(out)
    monkeypatch.undo()
    check_files(out)
    assert content(out) == make(1).files()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("x" * 300, "file/out", "a\0b", "/proc/out"):
        with pytest.raises(ArtifactError):
            make().save(tmp_path / place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_facts_that_could_not_be_read_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"report"):
        make(report="all well").save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- what was killed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["part", "old"])
def test_a_save_that_ended_between_its_renames_is_repaired(left: str, tmp_path: Path) -> None:
    out = make(1).save(tmp_path / "out")
    out.rename(tmp_path / ".out.old4194305")
    if left == "part":
        make(2).save(out)
        out.rename(tmp_path / ".out.part4194305-0")
        placing.begin(tmp_path / ".out.part4194305-0", list(NAMES))
    want = make(2 if left == "part" else 1).files()
    check_files(out)
    assert content(out) == want
    make(3).save(out)
    assert content(out) == make(3).files()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_not_whole_is_not_put_in_place(tmp_path: Path) -> None:
    make(1).save(tmp_path / "out").rename(tmp_path / ".out.old4194305")
    flipped(tmp_path / ".out.old4194305" / "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"is no artifact"):
        check_files(tmp_path / "out")


def test_leftovers_that_hold_something_else_stay(tmp_path: Path) -> None:
    for name in (".out.part4194305", ".out.old4194305", ".out.part-mine", ".other.part4194305"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / ".out.old1").write_text("a file")
    make().save(tmp_path / "out")
    assert len(list(tmp_path.rglob("notes.txt"))) == 4 and (tmp_path / ".out.old1").exists()


LISTED = {"sha256": "0" * 64, "bytes": 4}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("part7", {"manifest.json.part": ["important.bin"], "important.bin": "mine"}),
        ("part7", {"manifest.json.part": {"format": "tfqc-artifact", "inode": 1, "files": ["important.bin"]},
                   "important.bin": "mine"}),
        ("part7", {"manifest.json.part": "mine"}),
        ("part7", {"manifest.json.part": "", "manifest.json": "mine"}),
        ("old9", {"manifest.json": {"format": "tfqc-artifact", "version": 2,
                                    "files": {"program.ir": LISTED, "important.bin": LISTED}},
                  "important.bin": "mine"}),
        ("old9", {"manifest.json": "mine"}),
    ],
)  # fmt: skip
def test_what_only_bears_our_names_stays(name: str, files: dict[str, object], tmp_path: Path) -> None:
    theirs = tmp_path / f".out.{name}"
    theirs.mkdir()
    for file, value in files.items():
        (theirs / file).write_text(value if isinstance(value, str) else json.dumps(value))
    before = content(theirs)
    make().save(tmp_path / "out")
    assert content(theirs) == before


def test_what_was_replaced_and_then_edited_stays(tmp_path: Path) -> None:
    old = make(1).save(tmp_path / "out").rename(tmp_path / ".out.old4194305")
    (old / "model.py").write_text((old / "model.py").read_text() + "# mine\n")
    before = content(old)
    make(2).save(tmp_path / "out")
    assert content(old) == before


def test_a_part_that_a_killed_save_had_begun_is_removed(tmp_path: Path) -> None:
    for number in range(3):
        (part := tmp_path / f".out.part4194305-{number}").mkdir()
        if number == 1:
            (part / placing.NAMES).write_text("")
        elif number == 2:
            placing.begin(part, list(NAMES))
            (part / "model.py").write_text("half a")
            (part / MANIFEST).write_text('{"for')
    make().save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    out = tmp_path / "out"
    contents = [make(value).files() for value in range(3)]
    make(2).save(out)

    def save_for_ever() -> None:
        while True:
            for value in range(2):
                make(value).save(out)

    for number in range(20):
        killed(save_for_ever, number)
        check_files(out)
        assert content(out) in contents
    make(2).save(out)
    assert content(out) == contents[2]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_at_once(tmp_path: Path) -> None:
    """One wins, whole."""
    out = tmp_path / "out"
    children: list[int] = []
    for value in range(3):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                for _ in range(20):
                    make(value).save(out)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    check_files(out)
    assert content(out) in [make(value).files() for value in range(3)]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
