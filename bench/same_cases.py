"""The cases of same_bytes.py: small models of random weights at every strategy, target and option of a target."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

import tfqc

STRATEGIES = ("tib", "tib+fsc", "tib+tiar", "tib+tiar+fsc", "cache8", "cache4", "table", "fold", "select")
BACKENDS = ("fake-quant", "cpu-int8", "cuda-int4")
OPTIONS = {
    "fake-quant": (
        "weights=4 activations=8", "weights=4 activations=none", "mode=static", "mode=per-token", "group=32 weights=4",
        "edges=none weights=4 activations=4", "policy=nearest",
    ),
    "cpu-int8": (
        "activations=static", "activations=per-token", "weights=4", "residual=fp32", "attention=bf16", "attention=fp32",
        "isa=avx2",
    ),
    "cuda-int4": (
        "mode=w4a8", "mode=w4a16", "group=128", "rank=16", "activations=per-token", "activations=static", "edges=none",
        "arch=sm_89",
    ),
}  # fmt: skip
CALLS = ((750,), (250,), (333,), (500, 111))  # DDIM's four steps are 750, 500, 250, 0; 333 and 111 are no steps


# -- models: a denoiser, and its conditions for a number of images ----------------------------------------------------


def unet() -> nn.Module:
    """Stable Diffusion's blocks; wide enough that each backend multiplies with its kernels, in groups of 128, too."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, cross_attention_dim=64, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def pixels() -> nn.Module:
    """A UNet without conditions, attention in its lower level."""
    return UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def dit() -> nn.Module:
    """A transformer that time and class modulate."""
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[int], dict[str, Tensor]]]] = {
    "unet": (unet, "sample", lambda n: {"encoder_hidden_states": noise(n, 5, 64)}),
    "pixels": (pixels, "sample", lambda n: {}),
    "dit": (dit, "hidden_states", lambda n: {"class_labels": torch.arange(n) * 8 % 10}),
}


def noise(*shape: int) -> Tensor:
    """Normal numbers, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs(model: str, *timesteps: int) -> dict[str, Tensor]:
    """A call of one image a timestep."""
    _, noisy, conditions = MODELS[model]
    count = len(timesteps)
    return {noisy: noise(count, 4, 8, 8), "timestep": torch.tensor(timesteps), **conditions(count)}


@functools.cache
def denoiser(model: str) -> nn.Module:
    """A model, every parameter of it random: zeros (adaLN-zero) would make features constant."""
    torch.manual_seed(0)
    made = MODELS[model][0]().eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.dim() < 2 or not parameter.any():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@functools.cache
def captured(model: str) -> tfqc.Program:
    """Its program, for the many cases that need not capture it anew."""
    return tfqc.capture(denoiser(model), inputs(model, 7, 421))


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is compiled, and how: `fold` at a target without options from the module, the rest from its program."""

    model: str
    strategy: str
    target: str

    @property
    def name(self) -> str:
        """A directory's name."""
        return re.sub(r"[^\w.+=-]+", ".", f"{self.model}.{self.strategy}.{self.target}").strip(".")

    def write(self, into: Path) -> str:
        """Artifact and answers, or why there is none; returns which of the two."""
        directory = into / self.name
        directory.mkdir(parents=True, exist_ok=True)
        from_module = self.strategy == "fold" and self.target in BACKENDS
        conditions = MODELS[self.model][2](2)
        uncond = {name: torch.zeros_like(value) for name, value in conditions.items()} or None
        try:
            artifact = tfqc.compile(
                denoiser(self.model) if from_module else captured(self.model),
                self.target,
                example_inputs=inputs(self.model, 7, 421) if from_module else None,
                schedule=DDIMScheduler(clip_sample=False),
                steps=4,
                calibration=tfqc.Calibration(noise(2, 4, 8, 8), conditions, uncond),
                strategy=self.strategy,
                workdir=into / "trajectories",
            )
        except tfqc.TfqcError as error:
            (directory / "refused.txt").write_text(f"{error}\n")
            return "refused"
        loaded = tfqc.load(artifact.save(directory / "artifact"))
        answers = {" ".join(map(str, call)): first(loaded(**inputs(self.model, *call))) for call in CALLS}
        save_file(answers, directory / "outputs.part")
        (directory / "outputs.part").rename(directory / "outputs.safetensors")
        return "compiled"


def cases() -> Iterator[Case]:
    """Every strategy at every backend; every option; the other models at two strategies."""
    yield from (Case("unet", strategy, backend) for strategy in STRATEGIES for backend in BACKENDS)
    yield from (Case("unet", "fold", f"{b}{{{options}}}") for b in BACKENDS for options in OPTIONS[b])
    for model in ("pixels", "dit"):
        yield from (Case(model, strategy, b) for strategy in ("fold", "tib+tiar+fsc") for b in BACKENDS)


def done(case: Path) -> bool:
    """True if a case was written to its end."""
    return (case / "outputs.safetensors").exists() or (case / "refused.txt").exists()


def first(output: Any) -> Tensor:
    """The tensor of a model's answer."""
    return (output if isinstance(output, Tensor) else output[0]).contiguous()
