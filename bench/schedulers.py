"""Which rows does a compiled model find with each scheduler, which does it compute, and what comes out?

    python bench/schedulers.py            # results in bench/results/schedulers.json; goes on where it stopped

Each scheduler compiles a model once, for ten steps at W8A8 (fake-quant), and samples with the artifact in four ways:
as compiled, with twice the steps, a suffix of the schedule from an image (`strength` 0.6), and another sampler. A time
that the artifact was not compiled for has its row computed in the run. PSNR is to full precision with the same
scheduler, noise and labels, in dB, over the range of its latents, averaged over images.

Models: `fashion-unet`, which ships (v-prediction, guidance), and a small SD3 transformer with random weights for the
schedulers of flow matching, whose images are noise: its PSNR says what rounding does, not how an image looks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from tabulate import tabulate
from torch import Tensor

import tfqc
from tfqc.models.examples import example_inputs
from tfqc.models.find import find_model
from tfqc.models.spec import ModelSpec
from tfqc.sampling.loop import sample
from tfqc.sampling.schedule import SamplingSchedule

TARGET = "fake-quant{weights=8 activations=8}"
STEPS, STRENGTH = 10, 0.6
RESULTS = Path(__file__).parent / "results" / "schedulers.json"
EVEN = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
SIGMAS = [40.0, 20.0, 10.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.1, 0.05, 0.0]
FLOW_SIGMAS = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.4, 0.3, 0.1]

# name: the class, its configuration beside the model's, what set_timesteps gets beside the number of steps
FASHION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}, {}),
    "DDPM": ("DDPMScheduler", {}, {}),
    "DDPM, timesteps": ("DDPMScheduler", {}, {"timesteps": EVEN}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "Euler": ("EulerDiscreteScheduler", {}, {}),
    "Euler, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    "Euler, exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, {}),
    "Euler, timesteps": ("EulerDiscreteScheduler", {}, {"timesteps": EVEN}),
    "Euler, sigmas": ("EulerDiscreteScheduler", {}, {"sigmas": SIGMAS}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    # From the sigma of 20,291 at timestep 999, its correction takes the model in full precision off its path, too.
    "Heun": ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}, {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}, {}),
    "DPM-Solver++ SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM-Solver++ singlestep": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, {}),
    "DEIS": ("DEISMultistepScheduler", {}, {}),
    "SA-Solver": ("SASolverScheduler", {}, {}),
    "UniPC": ("UniPCMultistepScheduler", {}, {}),
    "LCM": ("LCMScheduler", {}, {}),
    "TCD": ("TCDScheduler", {}, {}),
}  # fmt: skip
FLOW: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}, {}),
    "flow Euler, mu = 0.8": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 0.8}),
    "flow Euler, sigmas": ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": FLOW_SIGMAS}),
    "flow Heun": ("FlowMatchHeunDiscreteScheduler", {}, {}),
    "flow LCM": ("FlowMatchLCMScheduler", {}, {}),
    "flow UniPC": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
    "flow DPM-Solver++": (
        "DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {},
    ),
}  # fmt: skip


def main() -> None:
    """Compute what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    config = {"images": options.images, "seed": options.seed, "steps": STEPS, "strength": STRENGTH, "target": TARGET}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows: dict[str, Any] = kept["rows"] if kept.get("config") == config else {}
    for spec, schedulers, other in (
        (find_model("fashion-unet"), FASHION, "DDIMScheduler"),
        (flow_model(), FLOW, "FlowMatchHeunDiscreteScheduler"),
    ):
        for name, how in schedulers.items():
            if len(rows.get(name, ())) < 4:
                print(f"{name} ...", flush=True)
                rows[name] = Bench(spec, options.images, options.seed, *how).row(other)
                options.out.write_text(json.dumps({"config": config, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def flow_model() -> ModelSpec:
    """An SD3 transformer of three layers, with random weights."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        caption_projection_dim=64, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    with torch.no_grad():
        model.proj_out.weight.mul_(3)  # of the size of noise
    return ModelSpec("sd3-small", model.eval().requires_grad_(False), example_inputs(model))


class Suffix:
    """A scheduler of which the last timesteps are visited, from a latent that has its noise; it knows of them all."""

    init_noise_sigma = 1.0

    def __init__(self, own: Any, start: int) -> None:
        self.timesteps, self.step, self.config = own.timesteps[start:], own.step, own.config
        self.scale_model_input = getattr(own, "scale_model_input", lambda x, t: x)


class Bench:
    """One scheduler on one model."""

    def __init__(
        self, spec: ModelSpec, images: int, seed: int, cls: str, changes: dict[str, Any], arguments: dict[str, Any]
    ) -> None:
        self.spec, self.seed, self.arguments = spec, seed, arguments
        self.data = spec.calibration(images, seed)
        self.config = dict(spec.scheduler.config) if spec.scheduler is not None else {}
        self.make = lambda: self._made(cls, changes)

    def row(self, other: str) -> dict[str, dict[str, float]]:
        """(rows found, rows computed, PSNR) of each way of sampling."""
        scheduler = self.make()
        lists = {"timesteps", "sigmas"} & self.arguments.keys()
        scheduler.set_timesteps(**({} if lists else {"num_inference_steps": STEPS}), **self.arguments)
        schedule = SamplingSchedule.of(scheduler)
        spec = replace(self.spec, scheduler=None)
        with tempfile.TemporaryDirectory() as directory:
            artifact = tfqc.compile(spec, TARGET, schedule=schedule, calibration=4).save(Path(directory) / "out")
            twice = self.make()
            twice.set_timesteps(2 * STEPS, **{k: v for k, v in self.arguments.items() if k == "mu"})
            another = self._made(other if type(scheduler).__name__ != other else "EulerDiscreteScheduler", {})
            another.set_timesteps(STEPS)
            ways = {"as compiled": scheduler, "twice the steps": twice, "other sampler": another}
            found = {name: self._sampled(artifact, schedule, its, self.data.latents) for name, its in ways.items()}
            found["suffix"] = self._suffix(artifact, schedule, scheduler)
        return found

    def _suffix(self, artifact: Path, schedule: SamplingSchedule, scheduler: Any) -> dict[str, float]:
        """From an image with noise, as image-to-image pipelines do."""
        image = self._run(self.spec.model, scheduler, self.data.latents)[0]
        order = getattr(scheduler, "order", 1)
        start = max(STEPS - int(STEPS * STRENGTH), 0) * order
        own = SamplingSchedule.of(scheduler).scheduler()
        first = own.timesteps[start : start + 1]
        if hasattr(own, "set_begin_index"):
            own.set_begin_index(start)
        if hasattr(own, "add_noise"):
            noisy = own.add_noise(image, self.data.latents, first.expand(len(image)))
        else:
            noisy = own.scale_noise(image, first, self.data.latents)
        return self._sampled(artifact, schedule, Suffix(own, start), noisy)

    def _sampled(self, artifact: Path, schedule: SamplingSchedule, its: Any, latents: Tensor) -> dict[str, float]:
        want, _ = self._run(self.spec.model, its, latents)
        got, asked = self._run(tfqc.load(artifact), its, latents)
        known = asked & set(schedule.timesteps)
        error = (got - want).square().flatten(1).mean(1)
        psnr = 10 * ((want.max() - want.min()) ** 2 / error).log10().mean()
        return {"found": len(known), "computed": len(asked - known), "psnr": round(float(psnr), 1)}

    def _run(self, model: Callable[..., Any], scheduler: Any, latents: Tensor) -> tuple[Tensor, set[float]]:
        """Final latents, and the times that the model was called with."""
        asked: set[float] = set()

        def denoiser(x: Tensor, t: Tensor, /, **conditions: Tensor) -> Any:
            asked.add(float(t))
            return model(**self.spec.call(x, t.expand(len(x)), {**conditions, **self.data.shared}))

        final = sample(
            denoiser, scheduler, latents=latents, cond=self.data.cond, uncond=self.data.uncond,
            guidance=self.data.guidance, seed=self.seed,
        )  # fmt: skip
        return final, asked

    def _made(self, cls: str, changes: dict[str, Any]) -> Any:
        own = {k: v for k, v in self.config.items() if not k.startswith("_")}
        return getattr(diffusers, cls).from_config({**own, **changes})


def table(rows: dict[str, Any]) -> str:
    """Found + computed rows, and PSNR, of each way."""
    ways = ("as compiled", "twice the steps", "suffix", "other sampler")
    cells = [
        [name, *(f"{w['found']} + {w['computed']}, {w['psnr']:.1f}" if (w := row.get(way)) else "-" for way in ways)]
        for name, row in rows.items()
    ]
    return tabulate(cells, ["found + computed, PSNR", *ways], tablefmt="github")


if __name__ == "__main__":
    main()
