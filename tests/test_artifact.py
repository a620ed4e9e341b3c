"""Artifacts on disk: whole or refused, and never lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tfqc.artifact import MANIFEST, VERSION, Artifact, check_files, read_manifest
from tfqc.errors import ArtifactError


def make(value: float = 1.0) -> Artifact:
    tensors = {"w": torch.full((2, 2), value), "empty": torch.empty(0), "view": torch.arange(6).reshape(2, 3).T}
    return Artifact({"model.py": "x = 1\n", "program.ir": "é\n"}, {"weights.safetensors": tensors}, {"backend": "none"})


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_saved_bytes_are_those_of_the_manifest(tmp_path: Path) -> None:
    out = make().save(tmp_path / "deep" / "out")
    manifest = check_files(out)
    assert set(manifest["files"]) == {"model.py", "program.ir", "weights.safetensors"}
    assert manifest["files"]["model.py"]["bytes"] == 6
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert content(out) == make().files() == content(make().save(tmp_path / "again"))


def test_an_older_artifact_is_replaced(tmp_path: Path) -> None:
    make(1).save(tmp_path / "out")
    (tmp_path / "out" / "__pycache__").mkdir()
    make(2).save(tmp_path / "out")
    check_files(tmp_path / "out")
    assert content(tmp_path / "out") == make(2).files()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_changed_missing_newer(tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    data = (out / "weights.safetensors").read_bytes()
    (out / "weights.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"weights.safetensors has been changed since it was written"):
        check_files(out)
    (out / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"not whole: 'weights.safetensors' is missing"):
        check_files(out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "version": VERSION + 1}))
    with pytest.raises(ArtifactError, match=rf"format version {VERSION + 1}, newer than {VERSION}.*upgrade tfqc"):
        read_manifest(out)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', "\xff\x00", '{"format": "tfqc-artifact"}',
                                  '{"format": "tfqc-artifact", "version": "x", "files": {}}'])  # fmt: skip
def test_no_manifest_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError):
        check_files(tmp_path)
    with pytest.raises(ArtifactError, match=r"is no artifact"):
        read_manifest(tmp_path / "nowhere")


def test_a_manifest_names_files_inside_only(tmp_path: Path) -> None:
    out = make().save(tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"]["../secret"] = {"sha256": "", "bytes": 0}
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"'../secret'"):
        check_files(out)


def test_foreign_files_are_safe(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make().save(out)  # an empty directory is free
    (out / "thesis.txt").write_text("years of work")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"holds 'thesis.txt', which is no part of an artifact"):
            make(2).save(out)
        assert (out / "thesis.txt").read_text() == "years of work"
        (out / MANIFEST).unlink(missing_ok=True)
        (out / "model.py").unlink(missing_ok=True)
        for name in ("program.ir", "weights.safetensors"):
            (out / name).unlink(missing_ok=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"is a file: choose a directory"):
        make().save(tmp_path / "file")


@pytest.mark.parametrize("fails", [1, 2])
def test_a_failure_leaves_the_old_one(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, or the renaming fails, at any point."""
    out = make(1).save(tmp_path / "out")
    replace, count = os.replace, [0]

    def failing(a: Any, b: Any) -> None:
        count[0] += 1
        if count[0] == fails:
            raise OSError("no")
        replace(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=r"no"):
        make(2).save(out)
    monkeypatch.undo()

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"0123456789")
        raise OSError("disk full")

    monkeypatch.setattr("tfqc.artifact.save_file", full)
    with pytest.raises(OSError, match=r"disk full"):
        make(2).save(out)
    monkeypatch.undo()
    check_files(out)
    assert content(out) == make(1).files()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
