"""What a pipeline is calibrated on, in the forms that its users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tfqc
from tests.integrations.pipelines import pipeline
from tfqc.errors import CalibrationError, TfqcError
from tfqc.integrations.diffusers.datafree import without_data
from tfqc.integrations.diffusers.prompts import DEFAULT, runs_of
from tfqc.sampling.recording import record, record_each

PLAIN = "fake-quant{weights=none activations=none}"
W8A8 = "fake-quant{weights=8 activations=8}"


def images(pipe: Any, call: dict[str, Any]) -> Any:
    return np.asarray(pipe(**call, num_inference_steps=3, output_type="np", generator=torch.manual_seed(1))[0])


def test_default_prompts_stand_back_behind_what_is_said(tmp_path: Path) -> None:
    pipe, _ = pipeline("flux", tmp_path)
    assert [run["prompt"] for run in runs_of(pipe, None, {}, 0)] == list(DEFAULT[:4])
    for common in ({"prompt": "mine"}, {"prompt_embeds": torch.zeros(1, 6, 32)}):
        for run in runs_of(pipe, 2, common, 0):
            assert run.get("prompt") == common.get("prompt")
    seeds = [run["generator"].initial_seed() for run in runs_of(pipe, 3, {"prompt": "mine"}, 5)]
    assert seeds == [5, 6, 7]


def test_a_folder_of_images(tmp_path: Path) -> None:
    pipe, call = pipeline("inpaint", tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(CalibrationError, match="holds no images"):
        runs_of(pipe, folder, {}, 0)
    for name, mode in (("a", "RGB"), ("a.mask", "L"), ("b", "RGBA"), ("b.mask", "L")):
        Image.new(mode, (16, 16), 200 if mode == "L" else "red").save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    first, second = runs_of(pipe, folder, {"height": 16, "width": 16}, 0)
    assert (first["image"].mode, first["mask_image"].mode, second["image"].mode) == ("RGB", "L", "RGB")
    assert first["prompt"] == DEFAULT[0] != second["prompt"]
    want = images(pipe, call)
    tfqc.quantize(pipe, PLAIN, steps=3, calibration=folder, call={"height": 16, "width": 16})
    assert np.abs(images(pipe, call) - want).max() < 1e-4
    (folder / "c.png").write_bytes(b"no image either")
    with pytest.raises(CalibrationError, match=r"c\.png is no image that can be read"):
        runs_of(pipe, folder, {}, 0)


def test_what_a_pipeline_does_not_run_on(tmp_path: Path) -> None:
    """Its own words, and what to do; the pipeline is as it was."""
    pipe, _ = pipeline("img2img", tmp_path)
    scheduler, forward = pipe.scheduler, pipe.unet.forward
    for calibration in (None, ["a fox"], [{"image": 3}], [{}]):
        with pytest.raises(
            CalibrationError, match=r"Img2ImgPipeline does not run on what calibration gives it \(.*call="
        ):
            tfqc.quantize(pipe, W8A8, steps=2, calibration=calibration)
    assert pipe.scheduler is scheduler and pipe.unet.forward == forward


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": "int8"}, "There is no backend 'int8'"),
        ({"strategy": "fould"}, "There is no strategy 'fould'"),
        ({"plan": "conv_in weight"}, "Line 1 of the plan"),
        ({"pipeline": "normalise"}, "There is no pass 'normalise'"),
        ({"dynamic": 3}, "dynamic=3 is neither text"),
        ({"seed": "a"}, "seed='a' is no whole number"),
        ({"progress": 3}, "progress=3 has no track"),
        ({"steps": 2.5}, "steps=2.5 is no whole number"),
        ({"steps": 0}, "steps=0 is out of range"),
        ({"call": 3}, "call=3 is no mapping"),
    ],
)
def test_what_is_refused_before_the_pipeline_is_run(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    pipe, _ = pipeline("sd", tmp_path)
    pipe.scheduler = None  # a run would fail
    with pytest.raises(TfqcError, match=said):
        tfqc.quantize(pipe, **given)


def test_the_name_of_a_file_is_no_prompt(tmp_path: Path) -> None:
    pipe, _ = pipeline("sd", tmp_path)
    file = tmp_path / "prompts"
    file.write_text("\n \n")
    for text in (str(file), str(tmp_path), "not-there.txt"):
        with pytest.raises(CalibrationError, match="looks like a file"):
            runs_of(pipe, text, {}, 0)
    with pytest.raises(CalibrationError, match="prompts holds no prompts"):
        runs_of(pipe, file, {}, 0)
    assert [run["prompt"] for run in runs_of(pipe, "a fox/a dog.", {}, 0)] == ["a fox/a dog."]


def test_latents(tmp_path: Path) -> None:
    pipe, _ = pipeline("sd", tmp_path)
    latents = torch.randn(2, 4, 8, 8)
    runs = runs_of(pipe, latents, {"prompt": "mine"}, 0)
    assert [torch.equal(run["latents"][0], latents[i]) for i, run in enumerate(runs)] == [True, True]
    calls = record(pipe, pipe.unet, runs[1], run_denoiser=False).calls
    assert torch.equal(calls[0]["sample"][0], latents[1])


def test_calls_of_the_denoiser(tmp_path: Path) -> None:
    """From any iterable; their times are the schedule."""
    pipe, call = pipeline("sd", tmp_path)
    want = images(pipe, call)
    calls = record(pipe, pipe.unet, {**call, "num_inference_steps": 3}, run_denoiser=True).calls
    tfqc.quantize(pipe, W8A8, calibration=iter(calls), directory=tmp_path / "out")
    assert np.abs(images(pipe, call) - want).mean() < 0.1 * want.std()
    assert pipe.unet.compiled._schedule == [float(c["timestep"]) for c in calls]


@pytest.mark.parametrize(("name", "target"), [("sd", "cpu-int8{weights=4}"), ("sd", W8A8), ("experts", "cpu-int8")])
def test_without_data(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoisers are silent in the one run that there is."""
    pipe, call = pipeline(name, tmp_path)
    want = images(pipe, call)
    runs: list[bool] = []

    def watched(*args: Any, run_denoisers: bool, **more: Any) -> Any:
        runs.append(run_denoisers)
        return record_each(*args, run_denoisers=run_denoisers, **more)

    monkeypatch.setattr("tfqc.integrations.diffusers.quantize.record_each", watched)
    given = {k: v for k, v in call.items() if k != "prompt"}
    tfqc.quantize(pipe, target, steps=3, calibration="none", call=given)
    assert runs == [False]
    assert np.abs(images(pipe, call) - want).mean() < 0.15 * want.std()


def test_the_pipeline_without_data() -> None:
    target, passes = without_data(tfqc.Target.parse("cpu-int8{weights=4}"), "fold")
    assert str(target) == "cpu-int8{activations=per-token weights=4}" and "reconstruct-weights" not in str(passes)
    with pytest.raises(CalibrationError, match=r"mine has no ranges of activations that are found at run time"):
        without_data(tfqc.Target("mine", object()), "fold")


def test_what_is_no_calibration(tmp_path: Path) -> None:
    pipe, _ = pipeline("sd", tmp_path)
    for given in ({"prompt": "a"}, [1, 2], 1.5):
        with pytest.raises(CalibrationError, match="is neither a number, prompts"):
            tfqc.quantize(pipe, PLAIN, steps=3, calibration=given)  # pyright: ignore[reportArgumentType]
