"""Artifacts that were made to do harm, with hashes that fit: refused at load, or in one sentence at the first call."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tfqc
from tests.helpers import first
from tfqc.errors import TfqcError

STORED = Path(__file__).parents[1] / "artifacts" / f"v{tfqc.runtime.VERSION}" / "cpu-int8"


def call(t: int = 500) -> dict[str, Tensor]:
    stored = load_file(STORED.with_suffix(".call.safetensors"))
    stored.pop("want")
    return {**stored, "timestep": torch.tensor(t)}


def forged(tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """A copy with something changed and its manifest made to fit."""
    directory = Path(shutil.copytree(STORED, tmp_path / "forged"))
    change(directory)
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def text(edit: Callable[[str], str]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        before = (directory / "program.ir").read_text()
        after = edit(before)
        assert after != before
        (directory / "program.ir").write_text(after)

    return change


def tensors(edit: Callable[[dict[str, Tensor]], None], file: str = "weights.safetensors") -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        found = load_file(directory / file)
        edit(found)
        save_file(found, directory / file)

    return change


def without_rows(keep: str) -> Callable[[str], str]:
    """Tables that the program reads and does not say that it does."""
    return lambda ir: re.sub(rf"^  (?!{keep})(act|table)\.\S+ .*kind.*\n", "", ir, flags=re.MULTILINE)


LATE: dict[str, Callable[[Path], None]] = {
    "tables that are not listed": text(without_rows("nothing")),
    "one table that is not listed": text(without_rows(r"act\.conv")),
    "no places in memory": text(lambda ir: re.sub(r" memory=\{[^}]*\}| memory=\[[^\]]*\]", "", ir)),
    "an activation of no name": text(lambda ir: ir.replace('"silu"', '"junk"', 1)),
    "a target of another backend": lambda d: _manifest(d, "target", "fake-quant"),
    "a tensor more": tensors(lambda found: found.update(more=torch.zeros(3))),
    "a tensor more for the time": tensors(
        lambda found: found.update({"norm.bias": torch.zeros(1)}), "time.safetensors"
    ),
    "a scale that is no number": tensors(lambda found: _fill(found, "scale", float("nan"))),
    "a scale of zero": tensors(lambda found: _fill(found, "scale", 0.0)),
    "a shorter bias": tensors(lambda found: found.update({"leave.bias": torch.zeros(1)})),
}


def _fill(found: dict[str, Tensor], ending: str, value: float) -> None:
    """One tensor of that ending, so that it is not another check that finds it."""
    name = next(k for k in sorted(found) if k.endswith(ending) and k.startswith("act."))
    found[name] = torch.full_like(found[name], value)


def _manifest(directory: Path, key: str, value: Any) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, key: value}))


@pytest.mark.parametrize("forgery", LATE)
def test_a_forgery_ends_in_a_sentence(forgery: str, tmp_path: Path) -> None:
    """At load, at the first call, or when rows are added; and until then nothing is read that is not the model's."""
    directory = forged(tmp_path, LATE[forgery])
    with pytest.raises((TfqcError, ValueError)) as caught:
        model = tfqc.load(directory)
        for t in (500, *range(1, 40)):
            first(model(**call(t)))
    assert "\n" not in str(caught.value)


def test_the_copy_itself_is_good(tmp_path: Path) -> None:
    model = tfqc.load(forged(tmp_path, lambda _: None))
    for t in (500, *range(1, 40)):
        assert bool(first(model(**call(t))).isfinite().all())
