"""compile and load: from a model to an artifact that answers like it, and refusals that come first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import tfqc
from tests.cli import factories
from tests.helpers import first
from tests.subjects import Subjects, calibration
from tests.tiny import make_pass, tiny
from tfqc import driver
from tfqc.errors import ArtifactError, CalibrationError, PipelineError, SpecError, TfqcError
from tfqc.frontend import capture
from tfqc.instruments import Instrument
from tfqc.ir.parse import parse
from tfqc.passing.pipeline import Pipeline


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
        ({"schedule": [10.0, 1e39]}, CalibrationError, "no timestep"),
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
    assert sum(p.name.startswith("trajectory-") for p in stamps) == 2
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


# -- wrong arguments: one sentence at once ------------------------------------------------------------------------


class NoDenoiser:
    """A pipeline whose parts are none that is known."""

    vae = torch.nn.Identity()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, r"A NoneType is no model: give a torch module"),
    ({"model": 3}, r"A int is no model"),
    ({"model": torch.nn.Linear}, r"The class Linear is no model"),
    ({"model": NoDenoiser()}, r"A NoDenoiser is no model"),
    ({"model": "fashion-unett"}, r"no model 'fashion-unett'.*Did you mean 'fashion-unet'"),
    ({"model": ""}, r"is no diffusers folder"),
    ({"model": "no.such:factory"}, r"cannot be found"),
    ({"model": "json:dumps"}, r"'json:dumps' is called without arguments.*missing a required argument: 'obj'"),
    ({"model": "json:__name__"}, r"'json:__name__' is called without arguments.*not a callable"),
    ({"model": torch.nn.Linear(2, 2)}, r"inputs of a Linear are not known: give example_inputs"),
    ({"target": "fake-qant"}, r"Did you mean 'fake-quant'"),
    ({"target": None}, r"target=None is no target"),
    ({"target": "fake-quant{wieghts=4}"}, r"no option 'wieghts'.* Did you mean 'weights'"),
    ({"target": "fake-quant,cpu-int8"}, r"one name with options"),
    ({"target": ""}, r"one name with options"),
    ({"target": "cuda-int4{edges=99}"}, r"edges=99 is out of range"),
    ({"steps": 0}, r"steps=0 is out of range: at least 1"),
    ({"steps": -1}, r"steps=-1 is out of range"),
    ({"steps": 1.5}, r"steps=1.5 is no whole number"),
    ({"steps": "50"}, r"steps='50' is no whole number"),
    ({"steps": True}, r"steps=True is no whole number"),
    ({"steps": 5000}, r"DDIMScheduler cannot be set to 5000 steps"),
    ({"steps": None}, r"no number of steps: give steps=N"),
    ({"schedule": "ddim"}, r"schedule='ddim' is no schedule"),
    ({"schedule": 50}, r"schedule=50 is no schedule"),
    ({"schedule": DDIMScheduler}, r"is no schedule"),
    ({"schedule": {"timesteps": [3.0]}}, r"is no schedule"),
    ({"schedule": [10.0, "x"]}, r"The schedule holds 'x', which is no timestep"),
    ({"schedule": [float("nan")]}, r"holds nan, which is no timestep"),
    ({"schedule": torch.tensor([[1.0]])}, r"The schedule holds \[1.0\], which is no timestep"),
    ({"calibration": -3}, r"calibration=-3 is out of range"),
    ({"calibration": 0}, r"calibration=0 is out of range"),
    ({"calibration": "x"}, r"calibration='x' is no whole number, Calibration data"),
    ({"calibration": 2.5}, r"calibration=2.5 is no whole number"),
    ({"calibration": torch.zeros(2, 2)}, r"calibration: sample is \[2, 2\], and the example is "),
    (
        {"calibration": {"sampel": torch.zeros(2, 2)}},
        r"calibration: 'sampel' is no input of the model; it takes sample,",
    ),
    ({"calibration": {"timestep": torch.zeros(2)}}, r"'timestep' is the time, which the schedule tells"),
    ({"pipeline": ["normalize"]}, r"pipeline=\['normalize'\] is no pipeline"),
    ({"pipeline": 3}, r"pipeline=3 is no pipeline"),
    ({"pipeline": "normalise"}, r"Did you mean 'normalize'"),
    ({"strategy": "fould"}, r"Did you mean 'fold'"),
    ({"strategy": None}, r"There is no strategy None"),
    ({"strategy": "fould", "pipeline": "normalize"}, r"Did you mean 'fold'"),
    ({"example_inputs": {"smaple": torch.zeros(1)}}, r"takes no input 'smaple'"),
    ({"example_inputs": "x"}, r"example_inputs='x' is neither a mapping"),
    ({"example_inputs": 3}, r"example_inputs=3 is neither a mapping"),
    ({"example_inputs": {"sample": np.zeros(1)}}, r"example_inputs holds a numpy array: give the tensors"),
    ({"example_inputs": {}}, r"example_inputs holds nothing: give the tensors"),
    ({"plan": __file__}, r"is text, and there is a file of that name: give its Path"),
    ({"roles": {"smaple": "sample"}}, r"no input 'smaple' to give a role"),
    ({"roles": {"sample": "noise"}}, r"'noise' is no role"),
    ({"roles": 3}, r"roles=3 is no mapping from names or positions"),
    ({"roles": ["sample"] * 9}, r"There is no input number 2 to give a role; the inputs are sample, timestep"),
    ({"dynamic": {"smaple": {2: "H"}}}, r"no input 'smaple' with dynamic dimensions"),
    ({"dynamic": {"sample": "H"}}, r"dynamic=\{'sample': 'H'\} maps no dimensions"),
    ({"dynamic": {"sample": {2: "h"}}}, r"'h' is no name for a dimension"),
    ({"dynamic": 3}, r"dynamic=3 is neither text, such as 'H,W', nor a mapping"),
    ({"dynamic": "Q"}, r"sample has no dimension that is called Q"),
    ({"seed": "a"}, r"seed='a' is no whole number"),
    ({"seed": -1}, r"seed=-1 is out of range"),
    ({"seed": 2**70}, r"is out of range"),
    ({"workdir": 3}, r"workdir=3 is no path"),
    ({"workdir": __file__}, r"is a file: give a directory"),
    ({"instruments": [3]}, r"no list of instruments"),
    ({"progress": 3}, r"has no track\(\) and say\(\)"),
    ({"require_real": True}, r"fake-quant computes in floating point"),
]


@pytest.mark.parametrize(("changed", "why"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_wrong_arguments(changed: dict[str, Any], why: str, subject: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("exported")

    model = subject("unet2d").model  # the first that asks for it exports it
    monkeypatch.setattr("torch.export.export", never)
    options: dict[str, Any] = {"model": model, "target": "fake-quant", "schedule": ddim(), "steps": 4, **changed}
    with pytest.raises(TfqcError, match=why) as caught:
        driver.compile(options.pop("model"), options.pop("target"), **options)
    assert "\n" not in str(caught.value)


# -- refusals come before calibration ------------------------------------------------------------------------------


class Volumes(torch.nn.Module):
    """Convolutions that no backend has kernels for, between two that are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first, self.last = (torch.nn.Linear(n, 4) for n in (1, 4, 4))
        self.blocks = torch.nn.ModuleList(torch.nn.Conv3d(2, 2, 3, padding=1) for _ in range(4))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.first(sample) + self.time(timestep.float()[:, None] / 1000)[:, None, None, None]
        for block in self.blocks:
            h = block(h)
        return self.last(h)


VOLUMES = {"sample": torch.zeros(2, 2, 3, 4, 4), "timestep": torch.tensor([7, 421])}


@pytest.mark.parametrize("target", ["cpu-int8", "cuda-int4{mode=w4a8 edges=none}"])
def test_refused_before_the_calibration(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("tfqc.calibration.trajectories.sample", never)
    with pytest.raises(TfqcError, match=r"has no kernel for \d+ products? of Volumes") as caught:
        driver.compile(
            Volumes(), target, schedule=ddim(), steps=3, calibration=2, example_inputs=VOLUMES, require_real=True
        )
    wanted = "4 x aten.conv3d.default (blocks.0, blocks.1, ... 2 more): runs in torch: it is a convolution in three dim"
    assert [note for note in caught.value.notes if note.startswith(wanted)]


@pytest.mark.parametrize(
    ("target", "plan", "said"),
    [
        ("cuda-int4", None, "for edges=8, kernels take int4{per=channel}: say edges=none"),
        ("cuda-int4{edges=none}", "conv_in weight -> int4{per=group group=5}", "take 128, .*planned as int4{per=group"),
        ("cuda-int4{edges=none}", "conv_in input -> int6{symmetric=false}", "kernels take int4 or int8"),
        ("cuda-int4{edges=none}", "conv_in weight -> float", "planned as float, kernels take int4"),
        ("cpu-int8", "conv_in weight -> int8{per=group group=5}", "kernels take int8{per=channel} or int4"),
        ("cpu-int8", "conv_in weight -> int8{per=channel symmetric=false}", "points are not 0 .*take int8"),
        ("cpu-int8", "conv_in input -> int4{symmetric=false}", "in 0..15 .*kernels take int8{symmetric=false}"),
        ("cpu-int8", "conv_in input -> float{why=outliers}", "planned as float for outliers, kernels take int8"),
    ],
)  # fmt: skip
def test_what_the_plan_says_is_refused_before_the_calibration(
    target: str, plan: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal says what the plan would have to say, and which option it comes from."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("tfqc.calibration.trajectories.sample", never)
    model = factories.unet()
    with pytest.raises(TfqcError, match=r"has no kernel for \d+ products? of small-unet") as caught:
        driver.compile(model, target, steps=3, calibration=2, plan=plan, require_real=True)
    assert any(re.search(said.replace("{", r"\{"), note) and "conv_in" in note for note in caught.value.notes)


def test_a_pass_that_needs_values_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plug-in that knows nothing of rehearsals runs all the same."""
    seen: list[bool] = []

    def peek(program: Any, ctx: Any) -> None:
        seen.append(ctx.rehearsal)
        float(next(iter(program.tensors.values())).flatten()[0])

    passes = make_pass("peek", peek, data=frozenset({"weights"}))
    driver.compile(tiny(), schedule=[421.0], pipeline=Pipeline((passes,)), workdir=tmp_path)
    assert seen == [True, False]
