"""Times of every kind, through the whole compiler: tables are made for what calls ask for, in one precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tfqc
from tests.helpers import first
from tfqc.calibration.trajectories import Trajectories
from tfqc.errors import CalibrationError
from tfqc.passing.context import Context
from tfqc.runtime import UnknownTimestepWarning
from tfqc.sampling.calls import ModelCalls, load_calibration
from tfqc.sampling.data import Calibration
from tfqc.sampling.loop import sample
from tfqc.sampling.schedule import SamplingSchedule

FOLDED = "normalize,discover-tib,select-maintenance{strategy=fold},fold-cache"
TARGET = "fake-quant{weights=8 activations=8}"


class Denoiser(nn.Module):
    """A convolution that time is added to; times may be anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(2, 8)

    def forward(self, x: Tensor, timestep: Tensor, scale: Tensor) -> Tensor:
        t = timestep.float()
        e = self.time(torch.stack([torch.sin(t), torch.cos(3 * t)], 1))
        return self.last(nn.functional.silu(self.first(x) + e[:, :, None, None])) * scale[:, None, None, None]


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


def example(time: Tensor) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 8, 8), "timestep": time.expand(2), "scale": torch.ones(2)}


def compiled(model: nn.Module, directory: Path, time: Tensor, **options: Any) -> Any:
    options = {"calibration": 2, **options}
    return tfqc.load(tfqc.compile(model, TARGET, example_inputs=example(time), **options).save(directory / "out"))


WAYS: dict[str, tuple[type, dict[str, Any], dict[str, Any], Any]] = {
    "timesteps": (diffusers.EulerDiscreteScheduler, {}, {"timesteps": [900, 500, 100]}, None),
    "sigmas": (diffusers.EulerDiscreteScheduler, {}, {"sigmas": [14.6, 5, 1, 0.1]}, None),
    "float64": (diffusers.CMStochasticIterativeScheduler, {}, {"num_inference_steps": 4}, None),
    "negative": (diffusers.EDMEulerScheduler, {}, {"num_inference_steps": 4}, None),
    "visited twice": (diffusers.HeunDiscreteScheduler, {}, {"num_inference_steps": 3}, None),
    "visited twice, whole": (diffusers.PNDMScheduler, {}, {"num_inference_steps": 4}, None),
    "noise in step": (diffusers.LCMScheduler, {}, {"num_inference_steps": 3}, None),
    "mu": (
        diffusers.FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True},
        {"num_inference_steps": 4, "mu": 0.8}, lambda t: t / 1000,
    ),
    "rising": (diffusers.DDIMInverseScheduler, {}, {"num_inference_steps": 4}, lambda t: t / 1000),
    "sigma": (diffusers.EulerDiscreteScheduler, {}, {"num_inference_steps": 3}, lambda t: (t + 1).log() / 4),
}  # fmt: skip


@pytest.mark.parametrize("pipeline", [FOLDED, None], ids=["folded", "quantized"])
@pytest.mark.parametrize("way", WAYS)
def test_every_time_that_is_asked_for_has_its_row(
    way: str, pipeline: str | None, model: Denoiser, tmp_path: Path
) -> None:
    cls, config, arguments, times = WAYS[way]
    scheduler = cls(**config)
    scheduler.set_timesteps(**arguments)
    schedule = SamplingSchedule.of(scheduler, times=times)
    dtype = torch.int64 if all(t == int(t) for t in schedule.timesteps) else torch.float32
    loaded = compiled(model, tmp_path, torch.tensor(1, dtype=dtype), schedule=schedule, pipeline=pipeline)
    called: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        called.append(t)
        return first(loaded(x, t, torch.ones(len(x))))

    latents = torch.randn(2, 3, 8, 8)
    sample(denoiser, scheduler, latents=latents, cond={}, time_of=schedule.time)  # a warning is an error here
    for t in scheduler.timesteps:
        raw = t if times is None else times(t)
        got = first(loaded(latents, raw, torch.ones(2)))
        want = model(latents, torch.as_tensor(raw).expand(2), torch.ones(2))
        assert pipeline is None or torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        assert got.isfinite().all()
    assert len(loaded._known) == len(schedule) and called


def test_calibrating_twice_gives_the_same(model: Denoiser) -> None:
    """Also where the sampler draws noise in its steps, whatever torch's own generator is at."""
    texts: list[Any] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.rand(seed)
        artifact = tfqc.compile(
            model, TARGET, schedule=diffusers.EulerAncestralDiscreteScheduler(), steps=3, calibration=2,
            example_inputs={**example(torch.tensor(1.5)), "x": torch.zeros(2, 3, 8, 8)},
        )  # fmt: skip
        texts.append({f"{file}.{k}": v for file, held in artifact.tensors.items() for k, v in held.items()})
    assert texts[0].keys() == texts[1].keys()
    assert all(torch.equal(texts[0][k], texts[1][k]) for k in texts[0])


def test_every_visit_of_a_time_is_calibrated_on(model: Denoiser, tmp_path: Path) -> None:
    """Heun's first call at a time is a probe; what it comes back with counts too, also from files."""
    program = tfqc.Pipeline.parse("normalize").run(tfqc.capture(model, example(torch.tensor(1.5))))
    data = Calibration(torch.randn(2, 3, 8, 8), {"scale": torch.ones(2)})
    ctx = Context(
        schedule=SamplingSchedule.of(diffusers.HeunDiscreteScheduler(), 4), calibration=data, workdir=tmp_path
    )
    positions: list[int | None] = []
    sampled = Trajectories(program, ctx).sample(0, before=positions.append)
    assert positions == [0, 1, 1, 2, 2, 3, 3] and list(sampled.visits) == positions
    read = Trajectories(program, ctx).read(0)
    assert read is not None
    for batch in (sampled, read):
        visits = [(step, inputs["x"]) for step, inputs in batch.calls(program)]
        assert [step for step, _ in visits] == positions
        assert not torch.equal(visits[1][1], visits[2][1])
        assert torch.equal(visits[2][1], sampled.samples[2])


def test_a_suffix_is_calibrated_on_the_whole_run(model: Denoiser, tmp_path: Path) -> None:
    """As an image-to-image pipeline asks for it: `strength` 0.6 of ten steps."""
    whole = SamplingSchedule.of(diffusers.DDIMScheduler(), 10)
    for number, own in enumerate((whole.own, None)):
        suffix = SamplingSchedule(whole.timesteps[4:], whole.sampler, own)
        loaded = compiled(model, tmp_path / str(number), torch.tensor(1), schedule=suffix)
        assert tuple(loaded._known) == whole.timesteps[4:]
        other = SamplingSchedule((*whole.timesteps[4:], 3.0), whole.sampler)
        with pytest.raises(CalibrationError, match="does not visit timestep 3 in 10 steps"):
            other.scheduler()


class Straight:
    """A scheduler that diffusers does not have."""

    timesteps: tuple[float, ...] = ()

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = tuple(i / steps for i in range(steps))

    def step(self, output: Tensor, t: float, sample: Tensor) -> Tensor:
        assert isinstance(t, float) and output.shape == sample.shape
        return sample + output / len(self.timesteps)


def test_a_scheduler_of_ones_own_is_sampled_with(model: Denoiser, tmp_path: Path) -> None:
    loaded = compiled(model, tmp_path, torch.tensor(0.5), schedule=Straight(), steps=4)
    assert tuple(loaded._known) == (0.0, 0.25, 0.5, 0.75)
    assert first(loaded(torch.randn(2, 3, 8, 8), torch.tensor(0.75), torch.ones(2))).isfinite().all()


# -- calls of the model in the place of a sampler --------------------------------------------------------------------


def calls(times: list[float]) -> Iterator[dict[str, Any]]:
    for number, t in enumerate(times):
        torch.manual_seed(number)
        yield {"x": torch.randn(2, 3, 8, 8), "timestep": t, "scale": torch.ones(2)}


@pytest.mark.parametrize(
    "schedule",
    [
        [0.0, 0.25, 0.5, 0.75], np.array([0.0, 0.25, 0.5, 0.75]), torch.tensor([0.0, 0.25, 0.5, 0.75]),
        (0.75, 0.5, 0.25, 0.0), None,
    ],
)  # fmt: skip
def test_bare_times_with_recorded_calls(schedule: Any, model: Denoiser, tmp_path: Path) -> None:
    """Rectified flow from 0 to 1, as a list, an array, a tensor; the calls' own times by default."""
    data = calls([0.0, 0.25, 0.5, 0.75] * 2)
    loaded = compiled(model, tmp_path, torch.tensor(0.5), schedule=schedule, calibration=data)
    for call in calls([0.0, 0.25, 0.5, 0.75]):
        want = model(call["x"], torch.full((2,), call["timestep"]), call["scale"])
        assert (first(loaded(**call)) - want).norm() < 0.02 * want.norm()
    assert set(loaded._known) == {0.0, 0.25, 0.5, 0.75}


def test_ranges_come_from_the_calls_of_their_step(model: Denoiser, tmp_path: Path) -> None:
    """At another scale at each time; a time without a call takes those of the nearest."""
    data = [
        {"x": torch.full((2, 3, 8, 8), 10.0), "timestep": torch.tensor([1.0, 1.0]), "scale": torch.ones(2)},
        {"x": torch.full((2, 3, 8, 8), 0.1), "timestep": torch.tensor([0.0, 0.5]), "scale": torch.ones(2)},
    ]
    loaded = compiled(model, tmp_path, torch.tensor(0.5), schedule=[1.0, 0.9, 0.5, 0.0], calibration=data)
    scales = [v.flatten() for k, v in loaded.named_buffers() if k.startswith("act") and k.endswith("scale")]
    inputs = max(scales, key=lambda v: float(v[0]))
    assert len(inputs) == 4 and inputs[0] == inputs[1] and inputs[0] > 50 * inputs[2] > 0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "at least one call"),
        ([3], r"calibration\[0\] is a int: give each call as a mapping"),
        ([(torch.ones(1),)], r"calibration\[0\] is a tuple"),
        ([{"timestep": 0.5, "scale": torch.ones(2)}], r"calibration\[0\] has no 'x', which the model needs"),
        ([{"x": torch.ones(2, 3, 8, 8), "scale": torch.ones(2)}], r"calibration\[0\] has no 'timestep'"),
        ([{"x": torch.full((2, 3, 8, 8), torch.nan)}], "x holds NaN in call 0"),
        ([{"x": torch.ones(2, 4, 8, 8), "timestep": 0.5, "scale": torch.ones(2)}], "x is 2x4x8x8, and the model takes"),
        ({"x": torch.ones(2)}, r"x is \[2\], and the example is \[2, 3, 8, 8\]"),
        (torch.ones(2), r"x is \[2\], and the example is \[2, 3, 8, 8\]"),
        ("text", "is no whole number"),
    ],
)  # fmt: skip
def test_calls_that_are_none(given: Any, why: str, model: Denoiser) -> None:
    with pytest.raises(CalibrationError, match=why):
        tfqc.compile(model, TARGET, example_inputs=example(torch.tensor(0.5)), schedule=[0.5], calibration=given)


def test_calls_come_back_from_a_file(tmp_path: Path) -> None:
    data = ModelCalls.of(
        [{"x": torch.ones(2), "added": {"ids": [torch.zeros(1), None]}, "t": 1, "name": "x", "b": True}]
    )
    data.save(tmp_path / "calls.safetensors")
    again = ModelCalls.load(tmp_path / "calls.safetensors")
    assert set(again.calls[0]) == {"x", "added.ids.0", "t"} and torch.equal(again.calls[0]["x"], torch.ones(2))
    assert isinstance(load_calibration(tmp_path / "calls.safetensors"), ModelCalls)
    Calibration(torch.ones(1, 2), {}).save(tmp_path / "images.safetensors")
    assert isinstance(load_calibration(tmp_path / "images.safetensors"), Calibration)
    with pytest.raises(CalibrationError, match=r"'latents' is no input of one"):
        ModelCalls.load(tmp_path / "images.safetensors")


def test_bare_times_want_calls_where_activations_are_calibrated(model: Denoiser) -> None:
    with pytest.raises(tfqc.TfqcError, match="needs a diffusers scheduler, not bare timesteps"):
        tfqc.compile(model, TARGET, example_inputs=example(torch.tensor(0.5)), schedule=[0.5], calibration=2)
    calls = ModelCalls(({"x": torch.ones(1)},))
    assert not Context(schedule=SamplingSchedule((0.5,)), calibration=calls).lacks({"sampler", "calibration"})


# -- calls at times that the model was not compiled for --------------------------------------------------------------


def test_the_first_call_at_no_known_time_warns_once(model: Denoiser, tmp_path: Path) -> None:
    """As by a pipeline that divides by 1000 what the schedule was made for."""
    steps = diffusers.FlowMatchEulerDiscreteScheduler()
    loaded = compiled(model, tmp_path, torch.tensor(0.5), schedule=steps, steps=4)
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(UnknownTimestepWarning, match=r"4 timesteps from 1000 to 1, and is first called at 0\.667"):
        got = first(loaded(x, torch.tensor(0.667), torch.ones(2)))
    want = model(x, torch.tensor([0.667, 0.667]), torch.ones(2))
    assert (got - want).norm() < 0.05 * want.norm()  # its rows are computed
    loaded(x, torch.tensor(0.334), torch.ones(2))  # a second warning would be an error


def test_other_steps_behind_a_known_first_do_not_warn(model: Denoiser, tmp_path: Path) -> None:
    loaded = compiled(model, tmp_path, torch.tensor(5), schedule=diffusers.DDIMScheduler(), steps=4)
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in (torch.tensor([750, 33]), torch.tensor(625)):
            loaded(x, t, torch.ones(2))
    assert len(loaded._known) == 6


def test_times_of_a_model_in_half_precision_are_found(tmp_path: Path) -> None:
    """It is called with 0.7595 as bfloat16 has it."""
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(4, mu=0.8)
    schedule = SamplingSchedule.of(scheduler, times=lambda t: t / 1000)
    loaded = compiled(model, tmp_path, torch.tensor(0.5, dtype=torch.bfloat16), schedule=schedule)
    for t in scheduler.timesteps:
        loaded(torch.randn(2, 3, 8, 8), (t / 1000).bfloat16(), torch.ones(2))
    assert len(loaded._known) == 4
