"""The sampling loop, against denoisers whose answer is known and against every family of scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from tfqc.sampling.loop import initial_noise, sample

SHAPE = (4, 8, 8)
BASE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
FAMILIES = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**BASE, clip_sample=False, prediction_type="epsilon")


def toy(sample: Tensor, t: Tensor, *, shift: Tensor) -> Tensor:
    """Depends on all its inputs, row by row."""
    return torch.tanh(0.3 * sample + shift) + t / 2000


def shifts(n: int) -> dict[str, Tensor]:
    return {"shift": torch.linspace(-1, 1, n).view(n, 1, 1, 1)}


def test_noise_depends_on_seed_and_index_alone() -> None:
    noise = initial_noise(6, SHAPE, seed=3)
    assert noise.shape == (6, *SHAPE) and noise.dtype == torch.float32
    assert torch.equal(initial_noise(2, SHAPE, seed=3), noise[:2])
    assert not torch.equal(initial_noise(2, SHAPE, seed=4), noise[:2])
    assert len(noise.flatten(1).unique(dim=0)) == 6
    assert initial_noise(0, SHAPE, seed=3).shape == (0, *SHAPE)


def test_noise_is_standard_normal_and_uncorrelated_between_images() -> None:
    noise = initial_noise(200, SHAPE, seed=0).flatten(1)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert torch.corrcoef(noise[:20]).fill_diagonal_(0).abs().max() < 0.3


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_deterministic_and_independent_of_batch_size(family: Any, prediction: str) -> None:
    scheduler = family(**BASE, prediction_type=prediction)
    latents, cond, uncond = initial_noise(7, SHAPE, seed=1), shifts(7), {"shift": torch.zeros(7, 1, 1, 1)}

    def run(batch_size: int) -> Tensor:
        return sample(toy, scheduler, steps=6, latents=latents, cond=cond, uncond=uncond, batch_size=batch_size)

    runs = [run(batch_size) for batch_size in (7, 7, 3, 1)]
    assert runs[0].isfinite().all() and runs[0].shape == latents.shape
    assert torch.equal(runs[0], runs[1])
    for other in runs[2:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_a_perfect_denoiser_recovers_the_image(family: Any) -> None:
    """If the model always answers with the noise that leads to x0, every sampler must end in x0."""
    x0 = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(2, 4, 8, 8)
    scheduler = family(**BASE, prediction_type="epsilon")
    alpha_bar = scheduler.alphas_cumprod

    def perfect(sample: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar[int(t)]
        return (sample - a.sqrt() * x0) / (1 - a).sqrt()

    latents = initial_noise(2, SHAPE, seed=2)
    result = sample(perfect, scheduler, steps=20, latents=latents, cond={})
    torch.testing.assert_close(result, x0, rtol=0, atol=0.02)


def test_guidance_joins_both_halves_unconditional_first() -> None:
    rows: list[Tensor] = []

    def denoiser(sample: Tensor, t: Tensor, *, shift: Tensor) -> Tensor:
        assert t.shape == () and t.dtype == torch.int64
        rows.append(shift.flatten())
        return shift.expand_as(sample)

    outputs: list[Tensor] = []
    sample(
        denoiser,
        ddim(),
        steps=2,
        latents=torch.zeros(2, *SHAPE),
        cond={"shift": torch.full((2, 1, 1, 1), 5.0)},
        uncond={"shift": torch.full((2, 1, 1, 1), 1.0)},
        guidance=2.0,
        on_step=lambda index, t, latent, output: outputs.append(output),
    )
    assert rows[0].tolist() == [1, 1, 5, 5]
    assert all(torch.equal(o, torch.full((2, *SHAPE), 9.0)) for o in outputs) and len(outputs) == 2


def test_guidance_of_one_is_the_conditional_model() -> None:
    latents, cond = initial_noise(3, SHAPE, seed=5), shifts(3)
    plain = sample(toy, ddim(), steps=4, latents=latents, cond=cond)
    guided = sample(toy, ddim(), steps=4, latents=latents, cond=cond, uncond={"shift": -cond["shift"]}, guidance=1.0)
    torch.testing.assert_close(guided, plain)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: SimpleNamespace(sample=x)])
def test_every_kind_of_return_value(wrap: Any) -> None:
    latents = initial_noise(2, SHAPE, seed=0)
    result = sample(lambda x, t: wrap(0.1 * x), ddim(), steps=3, latents=latents, cond={})
    assert torch.equal(result, sample(lambda x, t: 0.1 * x, ddim(), steps=3, latents=latents, cond={}))


def test_callbacks_see_every_step_of_every_batch() -> None:
    latents, first = initial_noise(5, SHAPE, seed=0), list[Tensor]()
    counts, seen = list[tuple[int, int]](), list[tuple[int, int, int]]()

    def on_step(index: int, t: int, latent: Tensor, output: Tensor) -> None:
        seen.append((index, t, len(latent)))
        if index == 0:
            first.append(latent)

    sample(
        toy,
        ddim(),
        steps=2,
        latents=latents,
        cond=shifts(5),
        batch_size=3,
        progress=lambda done, total: counts.append((done, total)),
        on_step=on_step,
    )
    assert seen == [(0, 999, 3), (1, 499, 3), (0, 999, 2), (1, 499, 2)]
    assert counts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(torch.cat(first), latents)


def test_the_callers_objects_are_left_alone() -> None:
    scheduler, latents = ddim(), initial_noise(2, SHAPE, seed=0)
    scheduler.set_timesteps(7)
    before, noise = scheduler.timesteps.clone(), latents.clone()
    sample(toy, scheduler, steps=3, latents=latents, cond=shifts(2))
    assert torch.equal(scheduler.timesteps, before) and torch.equal(latents, noise)


def test_fractional_timesteps_are_passed_as_they_are() -> None:
    seen: list[Tensor] = []

    def denoiser(sample: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return sample

    euler = EulerDiscreteScheduler(**{**BASE, "timestep_spacing": "linspace"})
    sample(denoiser, euler, steps=3, latents=initial_noise(1, SHAPE, seed=0), cond={})
    assert [float(t) for t in seen] == [999, 499.5, 0]
    assert [t.dtype for t in seen] == [torch.int64, torch.float32, torch.int64]


def test_wrong_requests_are_refused() -> None:
    latents = initial_noise(2, SHAPE, seed=0)
    with pytest.raises(ValueError, match="'shift' has 3 rows for 2 latents"):
        sample(toy, ddim(), steps=2, latents=latents, cond=shifts(3))
    with pytest.raises(ValueError, match="uncond has"):
        sample(toy, ddim(), steps=2, latents=latents, cond=shifts(2), uncond={})
    with pytest.raises(ValueError, match="at least 1"):
        sample(toy, ddim(), steps=0, latents=latents, cond=shifts(2))


def test_no_images_is_no_work() -> None:
    result = sample(toy, ddim(), steps=2, latents=torch.empty(0, *SHAPE), cond=shifts(0))
    assert result.shape == (0, *SHAPE)
