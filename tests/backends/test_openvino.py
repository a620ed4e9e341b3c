"""The openvino backend: OpenVINO computes what fake-quant computes on the same pipeline."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tfqc
from tests.backends.test_onnx import difference
from tests.cli.factories import dit, tiny
from tfqc.codegen.artifact import Artifact
from tfqc.errors import ArtifactError, TfqcError
from tfqc.models.spec import ModelSpec
from tfqc.quant.step_policy import StepPolicy

openvino: Any = pytest.importorskip("openvino", reason="the extra tfqc[openvino] is not installed")
pytest.importorskip("onnxscript", reason="the extra tfqc[openvino] is not installed")
CALIBRATED = {"steps": 3, "calibration": 2}


STATIC = "openvino{mode=static}"


@pytest.fixture(scope="module")
def made() -> Artifact:
    """The tiny model with one range for all steps."""
    return tfqc.compile(tiny(), STATIC, **CALIBRATED)


def oracle_of(artifact: Artifact, directory: Path, make: Callable[[], ModelSpec] = tiny) -> Any:
    """What fake-quant makes of the same pipeline."""
    theirs = tfqc.compile(make(), "fake-quant", pipeline=artifact.facts["pipeline"], **CALIBRATED)
    return tfqc.load(theirs.save(directory / "theirs"))


def test_it_computes_what_fake_quant_computes(made: Artifact, tmp_path: Path) -> None:
    """Times of their own for each image, other numbers of images; and the folder without tfqc."""
    oracle, folder = oracle_of(made, tmp_path), made.save(tmp_path / "ours")
    model = tfqc.load(folder)
    for times in ([333, 333], [666, 0], [0, 333, 0]):
        call = {"sample": torch.randn(len(times), 2, 4, 4), "timestep": torch.tensor(times)}
        assert difference(model(**call), oracle(**call)) < 1e-2
    compiled = openvino.compile_model(openvino.Core().read_model(str(folder / "model.xml")), "CPU")
    call = {"sample": torch.randn(2, 2, 4, 4), "timestep": torch.tensor([333, 333])}
    (found,) = compiled({name: value.numpy() for name, value in call.items()}).values()
    assert difference(torch.from_numpy(found), oracle(**call)) < 5e-2  # in the precision that it takes by itself


def test_the_files(made: Artifact) -> None:
    """FakeQuantize for each quantized value, weights as integers, the same bytes twice, no paths of this machine."""
    text = made.binaries["model.xml"].decode()
    kinds = Counter(re.findall(r'<layer [^>]*type="(\w+)"', text))
    assert kinds["FakeQuantize"] == 2 and text.count('element_type="i8"') >= 2
    assert "tfqc-" not in text and str(Path(tfqc.__file__).parents[1]) not in text
    assert set(made.files()) == {"model.xml", "model.bin", "program.ir", "manifest.json"}
    assert tfqc.compile(tiny(), STATIC, **CALIBRATED).files() == made.files()


def test_ranges_and_protection_by_the_step(tmp_path: Path) -> None:
    ours = tfqc.compile(tiny(), "openvino", step_policy=StepPolicy(1), **CALIBRATED)
    model, oracle = tfqc.load(ours.save(tmp_path / "ours")), oracle_of(ours, tmp_path)
    for times in ([666, 666], [333, 666]):
        call = {"sample": torch.randn(2, 2, 4, 4), "timestep": torch.tensor(times)}
        assert difference(model(**call), oracle(**call)) < 1e-2


def test_only_what_is_planned_is_quantized(tmp_path: Path) -> None:
    """Products whose weights alone are quantized get their inputs as they are."""
    ours = tfqc.compile(dit(), "openvino{activations=none}", **CALIBRATED)
    model, oracle = tfqc.load(ours.save(tmp_path / "ours")), oracle_of(ours, tmp_path, dit)
    call = {**dit().example_inputs, "timestep": torch.tensor([333, 333])}  # pyright: ignore[reportGeneralTypeIssues]
    assert difference(model(**call), oracle(**call)) < 1e-5


def test_what_is_refused(made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = {**made.binaries, "model.xml": made.binaries["model.xml"][:100]}
    with pytest.raises(ArtifactError, match="OpenVINO does not take"):
        tfqc.load(replace(made, binaries=binaries).save(tmp_path / "out"))
    with pytest.raises(TfqcError, match="openvino does not run"):
        tfqc.compile(tiny(), "openvino{group=5}", **CALIBRATED)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TfqcError, match=r"The target openvino needs openvino, .* pip install 'tfqc\[openvino\]'"):
        tfqc.compile(tiny(), "openvino", **CALIBRATED)
