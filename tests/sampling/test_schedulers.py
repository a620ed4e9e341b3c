"""Every scheduler of diffusers, by class: what becomes of it; and the ways in which one can be set."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers
from torch import Tensor

from tfqc.arguments import read_schedule
from tfqc.errors import CalibrationError
from tfqc.passing import Context
from tfqc.runtime.plan import as_time
from tfqc.sampling.calls import ModelCalls
from tfqc.sampling.loop import initial_noise, sample
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.sampling.scheduler import scheduler_class

SHAPE = (4, 8, 8)
SAMPLES = "samples"
OWN = "is set, but steps with what its own pipeline alone has"
STEPLESS = "is set, but has no step()"
TOKENS = "is set, but steps through tokens, not through noise"
UNSET = "cannot be set to a number of steps alone"
ABSENT = "needs a package that is not here, or arguments"

# What there is no entry for fails: a class of a new diffusers has to be looked at.
CLASSES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler",
            "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
            "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
            "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeunDiscreteScheduler", "IPNDMScheduler",
            "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LTXEulerAncestralRFScheduler",
            "MiniMaxH3Scheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UnCLIPScheduler",
            "UniPCMultistepScheduler",
        ),
        (SAMPLES, ""),
    ),
    "CogVideoXDPMScheduler": (OWN, "needs old_pred_original_sample, timestep_back"),
    "KarrasVeScheduler": (OWN, "needs sigma_hat, sigma_prev, sample_hat"),
    "RePaintScheduler": (OWN, "needs original_image, mask"),
    "ScoreSdeVeScheduler": (STEPLESS, "has no step"),
    "ScoreSdeVpScheduler": (STEPLESS, "has no step"),
    "BlockRefinementScheduler": (TOKENS, "fails at timestep 3"),
    "DiscreteDDIMScheduler": (TOKENS, "fails at timestep 0"),
    "EntropyBoundScheduler": (TOKENS, "fails at timestep 0"),
    "DDPMWuerstchenScheduler": (TOKENS, "fails at timestep 1"),  # it wants a timestep for each image
    "PiflowScheduler": (TOKENS, "fails at timestep 1000: .*n_grid"),  # it wants the output of its own model
    "ConsistencyDecoderScheduler": (UNSET, "more than 2 inference steps"),
    "SCMScheduler": (UNSET, "num_inference_steps != 2"),
    "HeliosDMDScheduler": (UNSET, "cannot be set to 4 steps"),
    "HeliosScheduler": (UNSET, "cannot be set to 4 steps"),
    "AmusedScheduler": (ABSENT, "mask_token_id"),
    "VQDiffusionScheduler": (ABSENT, "num_vec_classes"),
    "RFD4ProteinaScheduler": (ABSENT, "schedule_mode"),
    "CosineDPMSolverMultistepScheduler": (ABSENT, "torchsde"),
    "DPMSolverSDEScheduler": (ABSENT, "torchsde"),
    "LMSDiscreteScheduler": (ABSENT, "scipy"),
}  # fmt: skip


def toy(x: Tensor, t: Tensor, /) -> Tensor:
    return 0.1 * x


def drawn(schedule: SamplingSchedule, batch_size: int = 64) -> Tensor:
    return sample(
        toy,
        schedule.scheduler(),
        latents=initial_noise(3, SHAPE, 0),
        cond={},
        batch_size=batch_size,
        time_of=schedule.time,
    )


def test_there_is_an_entry_for_every_class() -> None:
    assert {name for name in dir(schedulers) if name.endswith("Scheduler")} == set(CLASSES)


@pytest.mark.parametrize("name", [n for n, (what, _) in CLASSES.items() if what != ABSENT])
def test_every_class(name: str) -> None:
    what, why = CLASSES[name]
    scheduler = scheduler_class(name)()
    if what == UNSET:
        with pytest.raises(CalibrationError, match=why):
            SamplingSchedule.of(scheduler, 4)
        return
    schedule = SamplingSchedule.of(scheduler, 4)
    assert all(t == as_time(t) for t in schedule.timesteps)
    again = SamplingSchedule.from_json(schedule.to_json())
    assert again == schedule
    if what in (OWN, STEPLESS):
        assert why in schedule.cannot_sample
        refusal = Context(schedule=schedule).lacks({"sampler"})
        assert schedule.cannot_sample in refusal and "give another scheduler" in refusal
        calls = ModelCalls(({"x": torch.ones(1)},))
        assert not Context(schedule=schedule, calibration=calls).lacks({"sampler"})
        return
    if what == TOKENS:
        with pytest.raises(CalibrationError, match=why):
            drawn(schedule)
        return
    assert not schedule.cannot_sample
    first = drawn(schedule)
    state = torch.get_rng_state()
    assert torch.equal(drawn(schedule), first)  # also where it draws noise in step()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn(again), first)
    torch.testing.assert_close(drawn(schedule, batch_size=2), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, (what, _) in CLASSES.items() if what == ABSENT])
def test_classes_that_cannot_be_made_here(name: str) -> None:
    """With a package that is not installed, or with arguments that only its own pipeline knows."""
    try:
        getattr(schedulers, name)()
    except (ImportError, TypeError) as error:
        assert CLASSES[name][1] in str(error)
        if isinstance(error, ImportError):
            with pytest.raises(CalibrationError, match=rf"{name} needs .*{CLASSES[name][1]}"):
                scheduler_class(name)
    else:  # the package is here: it samples as the others do
        assert drawn(SamplingSchedule.of(scheduler_class(name)(), 4)).isfinite().all()


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddpm timesteps": ("DDPMScheduler", {}, {"timesteps": [900, 500, 100]}),
    "euler timesteps": ("EulerDiscreteScheduler", {}, {"timesteps": [900, 500, 100]}),
    "euler sigmas": ("EulerDiscreteScheduler", {}, {"sigmas": [14.6, 5, 1, 0.1]}),
    "heun timesteps": ("HeunDiscreteScheduler", {}, {"timesteps": [900, 500, 100]}),
    "dpm timesteps": ("DPMSolverMultistepScheduler", {}, {"timesteps": [900, 500, 100]}),
    "dpm sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {"num_inference_steps": 3}),
    "lcm timesteps": ("LCMScheduler", {}, {"timesteps": [999, 499]}),
    "lcm original steps": ("LCMScheduler", {}, {"num_inference_steps": 3, "original_inference_steps": 20}),
    "tcd timesteps": ("TCDScheduler", {}, {"timesteps": [999, 499]}),
    "unipc sigmas": ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, {"sigmas": np.array([1.0, 0.5, 0.2])}),
    "edm sigmas": ("EDMEulerScheduler", {}, {"sigmas": torch.linspace(0, 1, 3)}),
    "consistency": ("CMStochasticIterativeScheduler", {}, {"timesteps": [22, 0]}),
    "karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"num_inference_steps": 3}),
    "exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, {"num_inference_steps": 3}),
    "log sigma": (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.1, "sigma_max": 80.0,
         "use_karras_sigmas": True},
        {"num_inference_steps": 3},
    ),
    "flow mu": (
        "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"num_inference_steps": 4, "mu": 0.8},
    ),
    "flow sigmas": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": [1.0, 0.6, 0.3]}),
    "flow rising": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {"num_inference_steps": 3}),
    "flow stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {"num_inference_steps": 3}),
    "flow lcm": ("FlowMatchLCMScheduler", {}, {"sigmas": [1.0, 0.6, 0.3]}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, {"num_inference_steps": 3}),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing"}, {"num_inference_steps": 3}),
}  # fmt: skip


def as_set(way: str) -> Any:
    name, config, arguments = WAYS[way]
    scheduler = scheduler_class(name)(**config)
    scheduler.set_timesteps(**arguments)
    return scheduler


@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_stays_as_it_was_set(way: str) -> None:
    """Not made anew from its class and its number of steps; also when it comes back from JSON."""
    scheduler = as_set(way)
    schedule = SamplingSchedule.of(scheduler)
    wanted = [as_time(t) for t in scheduler.timesteps]
    assert schedule.timesteps == tuple(dict.fromkeys(wanted))
    seen: list[float] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return toy(x, t)

    def run(sampler: Any) -> Tensor:
        return sample(denoiser, sampler, latents=initial_noise(2, SHAPE, 0), cond={}, time_of=schedule.time)

    first = run(schedule.scheduler())
    assert seen == wanted
    assert torch.equal(run(SamplingSchedule.from_json(schedule.to_json()).scheduler()), first)
    assert SamplingSchedule.of(scheduler, len(wanted) if scheduler.num_inference_steps is None else None) == schedule


@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_that_was_used_begins_anew(way: str) -> None:
    scheduler = as_set(way)
    want = SamplingSchedule.of(scheduler)
    x = initial_noise(2, SHAPE, 0)
    for t in scheduler.timesteps[:2]:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(toy(seen, t), t, x, return_dict=False)[0]
    used = SamplingSchedule.of(scheduler)
    assert used == want and used.identity() == want.identity()
    assert torch.equal(drawn(used), drawn(want))


def test_schedules_that_visit_the_same_times_are_told_apart() -> None:
    """Kept trajectories are found by what the scheduler was set to, sigmas and all."""
    one, other = as_set("flow sigmas"), as_set("flow sigmas")
    other.sigmas = other.sigmas * 0.9
    a, b = SamplingSchedule.of(one), SamplingSchedule.of(other)
    assert a.timesteps == b.timesteps and a.identity() != b.identity()
    assert torch.equal(b.scheduler().sigmas, other.sigmas)
    assert SamplingSchedule.of(as_set("flow sigmas")).identity() == a.identity()


def test_dynamic_shifting_without_mu_says_what_to_call() -> None:
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(CalibrationError, match=r"cannot be set to 4 steps.*call set_timesteps\(4, mu=\.\.\.\)"):
        SamplingSchedule.of(scheduler, 4)
    scheduler.set_timesteps(4, mu=0.8)
    want = tuple(map(as_time, scheduler.timesteps))
    assert SamplingSchedule.of(scheduler).timesteps == SamplingSchedule.of(scheduler, 4).timesteps == want
    with pytest.raises(CalibrationError, match=r"cannot be set to 8 steps"):
        SamplingSchedule.of(scheduler, 8)


def test_the_callers_scheduler_is_left_alone() -> None:
    scheduler = as_set("euler sigmas")
    before = copy.deepcopy(vars(scheduler))
    schedule = SamplingSchedule.of(scheduler)
    drawn(schedule)
    SamplingSchedule.of(scheduler, 7)
    assert torch.equal(scheduler.sigmas, before["sigmas"]) and scheduler._step_index is None
    scheduler.set_timesteps(9)
    assert len(schedule.scheduler().timesteps) == len(schedule) == 3


class Straight:
    """A scheduler of nobody: flow times from 0 to 1, straight on."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = [i / steps for i in range(steps)]

    def step(self, output: Tensor, t: float, sample: Tensor) -> Tensor:
        return sample + output / len(self.timesteps)


def test_a_scheduler_of_ones_own() -> None:
    schedule = SamplingSchedule.of(Straight(), 4)
    assert schedule.timesteps == (0.0, 0.25, 0.5, 0.75)
    assert schedule.sampler == {"_scheduler": f"{__name__}.Straight", "_steps": 4}
    torch.testing.assert_close(drawn(schedule), initial_noise(3, SHAPE, 0) * 1.025**4)
    again = SamplingSchedule.from_json(schedule.to_json())
    assert again == schedule and "only the timesteps are known" in again.cannot_sample
    other = Straight()
    other.set_timesteps(4)
    assert SamplingSchedule.of(other).identity() == schedule.identity()


def test_a_configuration_that_is_no_json_is_used_all_the_same() -> None:
    """Betas as an array come back; what cannot be written down is kept in the object alone."""
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = SamplingSchedule.of(schedulers.DDIMScheduler(trained_betas=betas), 4)
    again = SamplingSchedule.from_json(schedule.to_json())
    assert torch.equal(drawn(schedule), drawn(again)) and "_state" not in schedule.sampler
    strange = schedulers.DDIMScheduler()
    strange.register_to_config(extra=object())
    schedule = SamplingSchedule.of(strange, 4)
    assert set(schedule.sampler) == {"_scheduler", "_steps"} and drawn(schedule).isfinite().all()
    other = Straight()
    other.config = object()  # type: ignore[attr-defined]
    assert len(SamplingSchedule.of(other, 3)) == 3


def test_lists_of_tensors_and_of_numpys_numbers() -> None:
    times = [torch.tensor(3.0), np.float32(2), np.int64(1), 0]
    assert SamplingSchedule.of(times).timesteps == (3.0, 2.0, 1.0, 0.0)
    assert read_schedule(times, None) == read_schedule(range(3, -1, -1), None) == SamplingSchedule.of(times)
    heun = schedulers.HeunDiscreteScheduler()
    heun.set_timesteps(3)
    for given in (heun.timesteps, list(heun.timesteps), heun.timesteps.numpy()):
        assert read_schedule(given, None) == SamplingSchedule((999.0, 499.5, 0.0))


def test_a_subclass_is_used_and_not_its_base() -> None:
    class Halved(schedulers.DDIMScheduler):  # type: ignore[misc, name-defined]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return (super().step(*args, **kwargs)[0] / 2,)

    base, own = SamplingSchedule.of(schedulers.DDIMScheduler(), 4), SamplingSchedule.of(Halved(), 4)
    assert base.timesteps == own.timesteps and base.identity() != own.identity()
    assert not torch.equal(drawn(own), drawn(base))
    assert "_class_name" not in own.sampler


# -- what the model is called with ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: (t + 1).log()])
def test_the_schedule_is_what_the_model_is_called_with(form: Any) -> None:
    schedule = SamplingSchedule.of(as_set("flow mu"), times=form)
    want = tuple(as_time(form(t)) for t in as_set("flow mu").timesteps)
    assert schedule.timesteps == want
    seen: list[float] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return toy(x, t)

    for its in (schedule, SamplingSchedule.from_json(schedule.to_json())):
        seen.clear()
        sample(denoiser, its.scheduler(), latents=initial_noise(1, SHAPE, 0), cond={}, time_of=its.time)
        assert tuple(seen) == want


def test_other_timesteps_of_the_scheduler_lie_on_the_line_or_are_not_known() -> None:
    straight = SamplingSchedule.of(as_set("flow mu"), times=lambda t: t / 1000)
    assert math.isclose(straight.time(250.0), 0.25, rel_tol=1e-5)
    bent = SamplingSchedule.of(as_set("flow mu"), times=lambda t: (t + 1).log())
    with pytest.raises(CalibrationError, match="at the scheduler's timestep 250 is not known"):
        bent.time(250.0)


@pytest.mark.parametrize("pairs", [3, [1], [[1]], [[1, "x"]], [[1, None]], {"a": 1}, [[1, float("nan")]]])
def test_pairs_of_times_that_are_none(pairs: Any) -> None:
    with pytest.raises(CalibrationError, match="no pairs of timesteps"):
        SamplingSchedule((1.0,), {"_class_name": "DDIMScheduler", "_times": pairs})


@pytest.mark.parametrize(
    "state",
    [
        3, {"step": 1.0}, {"set_timesteps": True}, {"config": 1.0}, {"__class__": 1.0}, {"a b": 1.0},
        {"sigmas": "text"}, {"timesteps": None}, {"timesteps": True}, {"_internal_dict": [1]},
        {"sigmas": {"kind": "tensor", "dtype": "float32"}},
        {"timesteps": {"kind": "tensor", "dtype": "x", "values": [1]}},
        {"sigmas": {"kind": "tensor", "dtype": "float32", "values": [[1]]}},
        {"sigmas": {"kind": "tensor", "dtype": "nn", "values": [1]}},
    ],
)  # fmt: skip
def test_state_from_a_stranger(state: Any) -> None:
    """Arrays and numbers that the class does not define: no method is replaced."""
    sampler = {"_class_name": "EulerDiscreteScheduler", "_steps": 2, "_state": state}
    with pytest.raises(CalibrationError, match="cannot be set to 2 steps"):
        SamplingSchedule((999.0, 0.0), sampler).scheduler()


# -- the rest of the loop ------------------------------------------------------------------------------------------


def test_what_lies_behind_the_latent_is_not_denoised() -> None:
    """Inpainting: 9 channels in, 4 out; mask and masked image go in as they are at every step."""
    seen: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return 0.1 * x[:, :4]

    latents = initial_noise(2, (9, 8, 8), 0)
    euler = SamplingSchedule.of(schedulers.EulerDiscreteScheduler(), 3).scheduler()
    result = sample(denoiser, euler, latents=latents, cond={})
    plain = sample(toy, euler, latents=latents[:, :4], cond={})
    assert torch.equal(result, torch.cat([plain, latents[:, 4:]], 1))
    assert all(torch.equal(x[:, 4:], latents[:, 4:]) for x in seen[1:])
    torch.testing.assert_close(seen[0][:, 4:], latents[:, 4:], rtol=0.01, atol=0.01)


def test_noise_of_a_step_belongs_to_an_image() -> None:
    ancestral = SamplingSchedule.of(schedulers.EulerAncestralDiscreteScheduler(), 4).scheduler()

    def run(n: int, seed: int = 0) -> Tensor:
        return sample(toy, ancestral, latents=initial_noise(n, SHAPE, 0), cond={}, seed=seed)

    assert torch.equal(run(2), run(3)[:2])
    assert not torch.equal(run(2, seed=1), run(2))
