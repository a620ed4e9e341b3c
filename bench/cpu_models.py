"""The models of the CPU benchmark: real architectures with seeded random weights, as diffusers folders.

Speed and memory do not depend on what weights say, and there is no way to a model hub where this runs. All peers read
the same folder and get the same inputs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from tfqc.models.zoo import fashion

SEED = 2407
SHARD_BYTES = 1 << 30  # what is held in memory while a folder is written
STEPS = 30  # of the schedule, for peers that know it
TIMESTEP = 957  # the first of DDIM's for so many steps: its calibration saw noise, which the inputs here are too
WEIGHTS = "diffusion_pytorch_model"

_SDXL = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_DIT = {"sample_size": 32, "num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "out_channels": 8}

Draw = Callable[..., Tensor]


def _classes(batch: int, draw: Draw) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(batch) % 1000}


def _text(tokens: int, width: int) -> Callable[[int, Draw], dict[str, Tensor]]:
    return lambda batch, draw: {"encoder_hidden_states": draw(batch, tokens, width)}


def _sdxl_request(batch: int, draw: Draw) -> dict[str, Any]:
    size = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).repeat(batch, 1)
    return {
        "encoder_hidden_states": draw(batch, 77, 2048),
        "added_cond_kwargs": {"text_embeds": draw(batch, 1280), "time_ids": size},
    }


@dataclass(frozen=True)
class Architecture:
    """A diffusers class with its configuration, and what it is called with besides noise and timestep.

    config: None for the model that ships with tfqc, which brings its weights. sample: the name of the noise input.
    repeats: timed forwards of one process. any_size: whether a trace of the model at one latent size serves for others.
    """

    cls: str
    config: Mapping[str, Any] | None
    latent: int
    request: Callable[[int, Draw], Mapping[str, Any]]
    repeats: int
    sample: str = "sample"
    any_size: bool = True


ARCHITECTURES = {
    "fashion": Architecture("UNet2DConditionModel", None, 16, _text(4, 128), repeats=50, any_size=False),
    "dit": Architecture(
        "DiTTransformer2DModel", _DIT, 32, _classes, repeats=50, sample="hidden_states", any_size=False
    ),
    "sd15": Architecture("UNet2DConditionModel", _SD15, 64, _text(77, 768), repeats=5),
    "sdxl": Architecture("UNet2DConditionModel", _SDXL, 128, _sdxl_request, repeats=2),
}


@dataclass(frozen=True)
class Case:
    """One network step that peers compete in: a model, how many images, how large; and where files are kept."""

    model: str
    batch: int
    latent: int
    work: Path

    @property
    def architecture(self) -> Architecture:
        """What the model is."""
        return ARCHITECTURES[self.model]

    @property
    def home(self) -> Path:
        """The folder of everything that is prepared for the model."""
        return self.work / self.model

    @property
    def folder(self) -> Path:
        """The diffusers folder that all peers read."""
        return self.home / "model"

    @property
    def reference(self) -> Path:
        """The output of torch in fp32."""
        return self.home / f"reference-b{self.batch}-l{self.latent}.pt"

    @property
    def weight_gib(self) -> float:
        """Size of the fp32 weights."""
        return sum(p.stat().st_size for p in self.folder.glob("*.safetensors")) / 2**30

    @property
    def sizes(self) -> str:
        """What sizes a trace serves for, as a part of file names."""
        return "any" if self.architecture.any_size else f"l{self.latent}"

    def example(self, batch: int = 1) -> dict[str, Any]:
        """Inputs to trace and to observe ranges with: small where a trace serves for all sizes."""
        latent = self.latent if not self.architecture.any_size else self.architecture.latent // 2
        return replace(self, batch=batch, latent=latent).inputs()

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of one call: always the same numbers."""
        generator = torch.Generator().manual_seed(SEED)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        noise = draw(self.batch, 4, self.latent, self.latent)
        time = torch.full((self.batch,), TIMESTEP)
        return {
            self.architecture.sample: noise,
            "timestep": time,
            **self.architecture.request(self.batch, draw),
        }

    def load(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The diffusers model, in eval mode and without gradients."""
        model = getattr(diffusers, self.architecture.cls).from_pretrained(self.folder, torch_dtype=dtype)
        return model.eval().requires_grad_(False)

    def make(self) -> None:
        """Write the diffusers folder, if it is not there yet."""
        if self.folder.is_dir():
            return
        part = self.home / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        config = self.architecture.config
        if config is None:
            fashion.load_unet().save_pretrained(part)
        else:
            with accelerate.init_empty_weights():
                model = getattr(diffusers, self.architecture.cls).from_config(config)
            model.save_config(part)
            save_shards(random_weights(model), part)
        part.rename(self.folder)


def flat(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a call by dotted name, in order: compilers of graphs know no nested dictionaries."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


class Flat(torch.nn.Module):
    """A model that is called with the tensors of `flat`, by position, and returns one tensor."""

    def __init__(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = list(flat(inputs))

    def forward(self, *tensors: Tensor) -> Tensor:
        """One network step."""
        call: dict[str, Any] = {}
        for name, tensor in zip(self.names, tensors, strict=True):
            *outer, last = name.split(".")
            (call.setdefault(outer[0], {}) if outer else call)[last] = tensor
        return self.model(**call, return_dict=False)[0]


def random_weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights for a model on the meta device: scaled by fan-in, so that activations stay near 1; norms scale by 1.
    Buffers that are saved come as they are."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape)
        if value.dim() > 1:
            yield name, value.normal_(std=1 / math.sqrt(value[0].numel()), generator=generator)
        else:
            yield name, value.fill_(1.0) if name.endswith("weight") else value.normal_(std=0.02, generator=generator)
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def save_shards(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Sharded safetensors with the index that diffusers reads."""
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = total = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        count += 1
        file = f"{WEIGHTS}-{count:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for name, value in weights:
        shard[name] = value
        size += value.nbytes
        total += value.nbytes
        if size >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=1))
