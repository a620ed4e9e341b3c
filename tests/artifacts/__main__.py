"""Writes the artifacts of the present version of the run time."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

import tfqc
from tests.helpers import first
from tfqc.codegen.artifact import Artifact
from tfqc.runtime import VERSION
from tfqc.sampling.data import Calibration

TARGETS = ("fake-quant{weights=4 activations=8}", "cpu-int8", "cuda-int4{arch=sm_86}")


class Denoiser(nn.Module):
    """A convolution that the time shifts, a norm, a convolution, and a prompt that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.time, self.text, self.norm = nn.Linear(1, 32), nn.Linear(8, 32), nn.GroupNorm(8, 32)

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """sample [B, 3, 8, 8], timestep [B], prompt [B, 8]."""
        shift = self.time(timestep.float()[:, None] / 1000)[:, :, None, None]
        h = F.silu(self.norm(self.enter(sample) + shift))
        return self.leave(h + self.text(prompt)[:, :, None, None])


def example() -> dict[str, Tensor]:
    """A call of two images."""
    made = torch.Generator().manual_seed(1)
    sample, prompt = torch.randn(2, 3, 8, 8, generator=made), torch.randn(2, 8, generator=made)
    return {"sample": sample, "timestep": torch.tensor([900, 900]), "prompt": prompt}


def small_artifact(target: str) -> Artifact:
    """The model above, compiled for four steps."""
    torch.manual_seed(0)
    model, data = Denoiser(), Calibration(torch.randn(4, 3, 8, 8), {"prompt": torch.randn(4, 8)})
    schedule = DDIMScheduler(clip_sample=False)
    return tfqc.compile(model, target, schedule=schedule, steps=4, calibration=data, example_inputs=example())


def main() -> None:
    """Three artifacts, and a call of each with its answer."""
    for target in TARGETS:
        directory = Path(__file__).parent / f"v{VERSION}" / target.partition("{")[0]
        loaded = tfqc.load(small_artifact(target).save(directory))
        call = {**example(), "timestep": torch.tensor([500, 33])}
        save_file({**call, "want": first(loaded(**call)).contiguous()}, directory.with_suffix(".call.safetensors"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
