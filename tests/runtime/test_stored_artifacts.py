"""Artifacts of every version of the run time go on loading, both ways, and give what they gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tfqc
import tfqc.runtime
from tests.helpers import first
from tfqc.errors import ArtifactError

STORED = sorted(p.parent for p in (Path(__file__).parents[1] / "artifacts").glob("v*/*/manifest.json"))


def test_each_backend_has_one_of_this_version() -> None:
    names = {p.name for p in STORED if p.parent.name == f"v{tfqc.runtime.VERSION}"}
    assert names == {"fake-quant", "cpu-int8", "cuda-int4"}


@pytest.mark.parametrize("way", ["as data", "by its own code"])
@pytest.mark.parametrize("directory", STORED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_it_loads_and_gives_what_it_gave(directory: Path, way: str) -> None:
    call = load_file(directory.with_suffix(".call.safetensors"))
    want = call.pop("want")
    model = tfqc.load(directory) if way == "as data" else tfqc.runtime.load(directory, trust_code=True)
    got = first(model(**call))
    # Codes between two values may flip from one CPU to the next, where torch or bf16 sums in another order.
    assert float((got - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("directory", STORED[:1], ids=lambda p: p.name)
def test_a_later_run_time_is_asked_for_in_one_sentence(directory: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(directory, tmp_path / "out"))
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["runtime"] = tfqc.runtime.VERSION + 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"upgrade tfqc") as caught:
        tfqc.load(copied)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"upgrade tfqc"):
        tfqc.runtime.load(copied, trust_code=True)


def test_code_in_the_directory_is_not_run(tmp_path: Path) -> None:
    """Not even where the manifest says that it is whole."""
    copied = Path(shutil.copytree(STORED[0], tmp_path / "out"))
    (copied / "model.py").write_text("raise SystemExit('model.py was run')\n")
    call = load_file(STORED[0].with_suffix(".call.safetensors"))
    want = call.pop("want")
    with pytest.raises(ArtifactError, match=r"model.py"):
        tfqc.load(copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    import hashlib

    data = (copied / "model.py").read_bytes()
    manifest["files"]["model.py"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    torch.testing.assert_close(first(tfqc.load(copied)(**call)), want, rtol=0.1, atol=0.1)
    with pytest.raises(SystemExit, match=r"was run"):
        tfqc.runtime.load(copied, trust_code=True)
