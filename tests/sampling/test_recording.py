"""What pipelines call their denoisers with, recorded from a run of them; and compiled, what they ask for is there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tfqc
from tests.helpers import first
from tfqc.models.examples import example_inputs
from tfqc.models.recorded import recorded_schedule
from tfqc.models.spec import ModelSpec
from tfqc.runtime.plan import as_time
from tfqc.sampling.recording import record

FOLDED = "normalize,discover-tib,select-maintenance{strategy=fold},fold-cache"
Made = tuple[Any, nn.Module, Mapping[str, Any]]


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def flux(dtype: torch.dtype = torch.float32) -> Made:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).to(dtype)  # fmt: skip
    example = {k: v.to(dtype) if v.is_floating_point() else v for k, v in example_inputs(model).items()}
    pipe = diffusers.FluxPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=model,
    )  # fmt: skip
    return pipe, model, example


def sd3() -> Made:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(scheduler=flow(), transformer=model, **dict.fromkeys(parts))
    return pipe, model, example_inputs(model)


def aura() -> Made:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    example = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 8, 32)}
    vae = diffusers.AutoencoderKL(block_out_channels=(32,))
    return diffusers.AuraFlowPipeline(None, None, vae, model, flow()), model, {**example, "timestep": torch.ones(2) / 2}


def sana() -> Made:
    model = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )  # fmt: skip
    example = {
        "hidden_states": torch.randn(2, 4, 32, 32), "encoder_hidden_states": torch.randn(2, 16, 8),
        "timestep": torch.tensor([500.0, 500.0]), "encoder_attention_mask": torch.ones(2, 16),
    }  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(32,))
    vae.register_to_config(encoder_block_out_channels=(8, 8))
    return diffusers.SanaPipeline(None, None, vae, model, flow()), model, example


def sd(scheduler: Any) -> Made:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, mid_block_type=None, cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(32,)), text_encoder=None, tokenizer=None, unet=model,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipe, model, example_inputs(model)


def ddpm() -> Made:
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
    )  # fmt: skip
    return diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()), model, example_inputs(model)


PIPELINES: dict[str, tuple[Callable[[], Made], int, tuple[float, ...]]] = {
    "flux": (flux, 4, (1.0, 0.90453076, 0.75951093, 0.51284415)),
    "flux in bf16": (lambda: flux(torch.bfloat16), 4, (1.0, 0.90234375, 0.76171875, 0.51171875)),
    "sd3": (sd3, 4, (1000.0, 667.0, 334.0, 1.0)),
    "aura": (aura, 4, (1.0, 0.667, 0.334, 0.001)),
    "sana": (sana, 4, (1000.0, 667.0, 334.0, 1.0)),
    "sd euler": (lambda: sd(diffusers.EulerDiscreteScheduler()), 4, (999.0, 666.0, 333.0, 0.0)),
    "sd pndm": (lambda: sd(diffusers.PNDMScheduler(skip_prk_steps=True)), 4, (751.0, 501.0, 251.0, 1.0)),
    "ddpm": (ddpm, 4, (750.0, 500.0, 250.0, 0.0)),
}


def made(name: str) -> tuple[Any, ModelSpec, int, tuple[float, ...]]:
    torch.manual_seed(0)
    make, steps, times = PIPELINES[name]
    pipe, model, example = make()
    return quiet(pipe), ModelSpec(name, model.eval().requires_grad_(False), example, pipe.scheduler), steps, times


@pytest.mark.parametrize("name", PIPELINES)
def test_the_schedule_is_what_the_pipeline_passes(name: str) -> None:
    pipe, spec, steps, times = made(name)
    ran: list[str] = []  # inside of the model: where it ran
    inner = next(m for m in spec.model.modules() if isinstance(m, nn.Linear))
    inner.register_forward_hook(lambda module, _, output: ran.append(output.device.type))
    before, forward, state = copy.deepcopy(vars(pipe.scheduler)), spec.model.forward, torch.get_rng_state()
    schedule, why = recorded_schedule(pipe, spec, steps)
    assert schedule is not None and not why
    assert schedule.timesteps == pytest.approx(times, rel=1e-6)
    assert set(ran) == {"meta"}  # the denoiser computed nothing
    assert vars(pipe.scheduler).keys() == before.keys() and "step" not in vars(pipe.scheduler)
    assert str(vars(pipe.scheduler)) == str(before)
    assert spec.model.forward == forward and "forward" not in vars(spec.model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["flux", "flux in bf16", "aura"])
def test_compiled_it_finds_all_that_the_pipeline_asks_for(name: str, tmp_path: Path) -> None:
    """No call is at an unknown time: a warning, and a row more, would tell."""
    pipe, spec, steps, times = made(name)
    if name == "flux in bf16":
        spec.model.float()  # captured in f32, called with the bf16 times of its pipeline
        spec.example_inputs = {k: v.float() for k, v in spec.example_inputs.items()}
        want, _ = recorded_schedule(*made(name)[:2], steps)
        artifact = tfqc.compile(spec, pipeline=FOLDED, schedule=want)
    else:
        artifact = tfqc.compile(pipe, pipeline=FOLDED, steps=steps, example_inputs=spec.example_inputs)
        assert "could not be recorded" not in "".join(artifact.facts["report"])
    assert artifact.facts["schedule"]["timesteps"] == pytest.approx(times, rel=1e-6)
    loaded: Any = tfqc.load(artifact.save(tmp_path / "out"))
    recorded = record(*_again(name))
    assert len(recorded.calls) >= steps
    for call in recorded.calls:
        loaded(**{**spec.example_inputs, spec.time_name(): call[spec.time_name()][:1]})
    assert len(loaded._known) == steps


def _again(name: str) -> tuple[Any, nn.Module, dict[str, Any]]:
    from tfqc.models.recorded import _calls

    pipe, spec, steps, _ = made(name)
    return pipe, spec.model, next(_calls(pipe, spec, steps))


@pytest.mark.parametrize("steps", [None, 4])
def test_a_scheduler_that_its_user_has_set_stays_so(steps: int | None) -> None:
    pipe, spec, _, _ = made("flux")
    pipe.scheduler.set_timesteps(4, mu=0.8)
    schedule, why = recorded_schedule(pipe, spec, steps)
    assert schedule is not None, why
    assert schedule.timesteps == tuple(as_time(t / 1000) for t in pipe.scheduler.timesteps)
    assert torch.equal(schedule.scheduler().sigmas, pipe.scheduler.sigmas)
    own = pipe.scheduler.timesteps.clone()
    other, _ = recorded_schedule(pipe, spec, 5)
    assert other is not None and len(other) == 5 and torch.equal(pipe.scheduler.timesteps, own)


def test_the_calls_of_a_run_are_calibration_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain().requires_grad_(False)
    found = record(Pipe(model), model, {"num_inference_steps": 4}, run_denoiser=True)
    assert len(found.calls) == 8 and not torch.equal(found.calls[0]["sample"], found.calls[2]["sample"])
    example = {"sample": torch.randn(2, 4), "timestep": torch.ones(2)}
    target = "fake-quant{weights=8 activations=8}"
    artifact = tfqc.compile(model, target, calibration=found.calls, example_inputs=example)
    assert artifact.facts["schedule"]["timesteps"] == [*map(as_time, (0.75, 0.5, 0.25, 0.0))]
    loaded: Any = tfqc.load(artifact.save(tmp_path / "out"))
    for call in found.calls:
        (want,) = model(**call)
        assert (first(loaded(**call)) - want).norm() < 0.05 * want.norm()
    assert len(loaded._known) == 4


class Plain(nn.Module):
    """Two layers, with a row of time between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.time = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(1, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        e = self.time(timestep.reshape(-1, 1).float())
        return (self.last(torch.relu(self.first(sample) + e)),)


class Picky(nn.Module):
    """Runs nowhere but on numbers: what it is called with decides what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        assert float(timestep) >= 0
        self.runs += 1
        return (self.layer(sample),)


class Popping(nn.Module):
    """Takes from a list what it reads of it, as U-Nets do with the residuals of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor, residuals: list[Tensor] | None = None) -> tuple[Tensor]:
        while residuals:
            sample = self.layer(sample + residuals.pop(0))
        return (sample,)


class Pipe:
    """A pipeline of nobody: two calls a step, times as a share of all."""

    def __init__(self, model: nn.Module, fails: bool = False) -> None:
        self.unet, self.scheduler, self.fails = model, diffusers.DDIMScheduler(), fails

    def __call__(self, num_inference_steps: int = 50) -> Tensor:
        if self.fails:
            raise ValueError("it needs an image.\nAnd more.")
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 4)
        for t in self.scheduler.timesteps:
            for _ in range(2):
                (output,) = self.unet(x, timestep=t / 1000)
            x = self.scheduler.step(output, timestep=t, sample=x).prev_sample
        return x


def test_a_model_that_does_not_run_on_the_meta_device_runs_once() -> None:
    model = Picky()
    found = record(Pipe(model), model, {"num_inference_steps": 4})
    assert model.runs == 1 and len(found.calls) == 8
    assert found.schedule("timestep").timesteps == tuple(map(as_time, (0.75, 0.5, 0.25, 0.0)))


@pytest.mark.parametrize("runs", [True, False])
def test_what_a_model_takes_from_its_arguments_is_recorded(runs: bool) -> None:
    model = Popping()
    given = [torch.ones(1, 4), torch.zeros(1, 4)]

    class Adapted(Pipe):
        def __call__(self, num_inference_steps: int = 50) -> Tensor:
            self.scheduler.set_timesteps(num_inference_steps)
            (made,) = self.unet(torch.randn(1, 4), timestep=self.scheduler.timesteps[0], residuals=[*given])
            return made

    (call,) = record(Adapted(model), model, {"num_inference_steps": 2}, run_denoiser=runs).calls
    assert len(call["residuals"]) == 2 and all(a is b for a, b in zip(call["residuals"], given, strict=True))


def test_a_pipeline_that_does_not_run_is_told_of() -> None:
    model = Picky().requires_grad_(False)
    example = {"sample": torch.randn(2, 4), "timestep": torch.ones(2)}
    spec = ModelSpec("picky", model, example, diffusers.DDIMScheduler())
    schedule, why = recorded_schedule(Pipe(model, fails=True), spec, 4)
    assert schedule is None and why == "it needs an image"
    forward = model.forward
    with pytest.raises(ValueError, match="it needs an image"):
        record(Pipe(model, fails=True), model, {})
    assert model.forward == forward
