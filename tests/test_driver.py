"""compile and load: from a model to an artifact that answers like it, and refusals that come first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import tfqc
from tests.helpers import first
from tests.subjects import Subjects, calibration
from tfqc import driver
from tfqc.errors import ArtifactError, CalibrationError, PipelineError, SpecError, TfqcError
from tfqc.frontend import capture
from tfqc.instruments import Instrument
from tfqc.ir.parse import parse


def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


def test_from_a_module_to_images(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    artifact = driver.compile(
        its.model, "fake-quant{weights=8 activations=8}", schedule=ddim(), steps=4, calibration=2,
        workdir=tmp_path / "w",
    )  # fmt: skip
    loaded = tfqc.load(artifact.save(tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["backend"] == "fake-quant" and manifest["target"].startswith("fake-quant")
    assert manifest["schedule"]["timesteps"] == [750, 500, 250, 0]
    assert manifest["calibration"]["images"] == 2 and manifest["seed"] == 0
    assert manifest["pipeline"].startswith("normalize,discover-tib")
    assert set(manifest["versions"]) >= {"tfqc", "torch", "diffusers"}
    with torch.no_grad():
        call = its.call([750.0, 750.0])
        want, got = its.reference(call), loaded(call["sample"], 750)
    assert got.sample.shape == want.shape
    assert float((first(got) - want).norm() / want.norm()) < 0.2
    # The program's text lies beside: it parses.
    parse((tmp_path / "out" / "program.ir").read_text())


def test_your_own_pipeline_and_program(subject: Subjects, tmp_path: Path) -> None:
    its = subject("chain")
    text = "select-maintenance{strategy=table},fold-cache{policy=nearest}"
    program = its.program
    artifact = driver.compile(program, schedule=[951.0, 37.0], pipeline=text)
    loaded = tfqc.load(artifact.save(tmp_path / "out"))
    call = its.call([951.0, 37.0])
    assert torch.allclose(first(loaded(**call)), its.reference(call), rtol=1e-4, atol=1e-5)
    assert program.stage < 2  # the caller's program is not touched


def test_unknown_classes_need_example_inputs(subject: Subjects, tmp_path: Path) -> None:
    its = subject("odd-names")
    text = "normalize,discover-tib,select-maintenance,fold-cache"
    artifact = driver.compile(
        its.model, schedule=[951.0], pipeline=text, example_inputs=its.inputs, roles={"a": "sample", "b": "time"}
    )
    loaded = tfqc.load(artifact.save(tmp_path / "out"))
    assert torch.allclose(loaded(**its.call([951.0])), its.reference(its.call([951.0])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "error", "why"),
    [
        ({"target": "fake-qant"}, SpecError, "fake-quant"),
        ({"target": "fake-quant{weights=99}"}, SpecError, "2 to 8 bits"),
        ({"strategy": "fould"}, SpecError, "Did you mean 'fold'"),
        ({"pipeline": "normalize,fold-cache"}, PipelineError, "#2 fold-cache needs stage analyzed"),
        ({"pipeline": "normalise"}, SpecError, "Did you mean 'normalize'"),
        ({"schedule": [10.0, 20.0]}, CalibrationError, "unsorted"),
        ({"schedule": []}, CalibrationError, "empty"),
        ({"schedule": None}, PipelineError, "needs a schedule"),
    ],
)
def test_refused_before_the_capture(
    changed: dict[str, Any], error: type[TfqcError], why: str, subject: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(driver, "capture", never)
    options: dict[str, Any] = {"target": "fake-quant", "schedule": ddim(), "steps": 4, **changed}
    with pytest.raises(error, match=why):
        driver.compile(subject("unet2d").model, options.pop("target"), **options)


def test_without_weights(subject: Subjects) -> None:
    its = subject("chain")
    program = its.program
    program.tensors = {name: t.to("meta") for name, t in program.tensors.items()}
    with pytest.raises(TfqcError, match=r"no weights"):
        driver.compile(program, schedule=[951.0], pipeline="select-maintenance,fold-cache")


def test_the_same_twice(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    files = []
    for part in ("a", "b"):  # trajectories made anew
        artifact = driver.compile(
            its.program, "fake-quant{weights=4 activations=8}", schedule=ddim(), steps=3,
            calibration=calibration(its), pipeline=_without_analysis("unet-sd"), workdir=tmp_path / part,
        )  # fmt: skip
        files.append(artifact.files())
    assert files[0] == files[1]


def _without_analysis(name: str) -> str:
    return "select-maintenance,calibrate-weights{bits=4},calibrate-activations,fold-cache,hoist-request,insert-qdq"


def test_interrupted_and_compiled_again(subject: Subjects, tmp_path: Path) -> None:
    """Ctrl-C loses no finished calibration batch."""
    its = subject("unet-sd")

    class Interrupt(Instrument):
        def after(self, program: Any, previous: Any, item: Any, number: int) -> None:
            if item.name == "calibrate-activations":
                raise KeyboardInterrupt

    def run(instruments: Any) -> Any:
        return driver.compile(
            its.program, schedule=ddim(), steps=3, calibration=calibration(its), workdir=tmp_path,
            pipeline=_without_analysis("unet-sd"), instruments=instruments,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run([Interrupt()])
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(stamps) == 2
    run(None)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == stamps


def test_loading_what_is_broken(subject: Subjects, tmp_path: Path) -> None:
    artifact = driver.compile(subject("chain").program, schedule=[951.0], pipeline="select-maintenance,fold-cache")
    out = artifact.save(tmp_path / "out")
    (out / "model.py").write_text((out / "model.py").read_text() + "\n# changed")
    with pytest.raises(ArtifactError, match=r"model.py has been changed"):
        tfqc.load(out)
    with pytest.raises(ArtifactError, match=r"has no manifest.json"):
        tfqc.load(tmp_path)


def test_labels_are_enumerated(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d-classes")
    program = capture(its.model, its.inputs, domains={"class_labels": 10})
    text = "normalize,discover-tib,select-maintenance,fold-cache{policy=error}"
    artifact = driver.compile(program, schedule=[951.0, 37.0], pipeline=text)
    assert "time.safetensors" not in artifact.tensors
    loaded = tfqc.load(artifact.save(tmp_path / "out"))
    for label in range(10):
        call = its.call([951.0, 37.0], class_labels=torch.tensor([label, 9 - label]))
        assert torch.allclose(first(loaded(**call)), its.reference(call), rtol=1e-4, atol=1e-5)
