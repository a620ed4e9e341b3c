"""The Fashion-MNIST denoiser that ships with tfqc: loaders for its parts, and images to latents and back.

Weights live in ``fashion-unet/`` beside this file, in diffusers' folder layout; ``fashion-unet/README.md`` is
the model card. Nothing here needs the data set or the network. All loaders return fp32 modules on the CPU, in
eval mode, without gradients; each call returns a fresh module, so a caller may change what it gets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "fashion-unet"

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""The names of labels 0..9, as the data set gives them."""

UNCONDITIONAL = 10
"""The label that stands for "no label", for classifier-free guidance: the last row of the token table."""

LATENT_SHAPE = (4, 16, 16)
"""Shape of one latent: the image padded to 32x32, each 2x2 block of pixels as four channels."""

M = TypeVar("M", bound=nn.Module)


class LabelTokens(nn.Module):
    """Look up the tokens that cross-attention reads, in the place of a text encoder's output.

    ``labels`` are int64 of shape [B], 0..9 for the classes and 10 for unconditional; the result is [B,
    n_tokens, dim].
    """

    def __init__(self, n_tokens: int = 4, dim: int = 128, n_labels: int = 11) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.dim = dim
        self.table = nn.Embedding(n_labels, n_tokens * dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table(labels).unflatten(1, (self.n_tokens, self.dim))


class Classifier(nn.Module):
    """A small CNN over images [B, 1, 28, 28] in [0, 1]; it judges what the denoiser draws.

    ``features`` gives the 64 inputs of the last layer, float32 [B, 64], not negative; ``forward`` gives
    logits [B, 10].
    """

    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

        self.body = nn.Sequential(
            conv(1, 24), conv(24, 32, stride=2), conv(32, 32), conv(32, 64, stride=2), conv(64, 64)
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images * 2 - 1).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def _config(file: str) -> dict[str, Any]:
    return json.loads((FOLDER / file).read_text())


def _load(module: M, file: str) -> M:
    """Fill ``module`` from a file of FOLDER; half-precision tensors widen to the module's fp32."""
    module.load_state_dict(load_file(FOLDER / file))
    return module.eval().requires_grad_(False)


def load_unet() -> UNet2DConditionModel:
    """The denoiser: ``unet(sample [B, 4, 16, 16], t, encoder_hidden_states=[B, 4, 128]).sample`` predicts v.

    The file holds fp16; the weights come back as fp32.
    """
    unet = UNet2DConditionModel.from_config(_config("unet/config.json"))
    return _load(cast(UNet2DConditionModel, unet), "unet/diffusion_pytorch_model.safetensors")


def load_scheduler() -> DDIMScheduler:
    """The sampler it was trained for: cosine schedule of 1000 steps, v-prediction, trailing timesteps."""
    scheduler = DDIMScheduler.from_config(_config("scheduler/scheduler_config.json"))
    return cast(DDIMScheduler, scheduler)


def load_tokens() -> LabelTokens:
    """The label tokens, trained together with the denoiser."""
    config = _config("tokens/config.json")
    tokens = LabelTokens(n_tokens=config["n_tokens"], dim=config["dim"], n_labels=config["n_labels"])
    return _load(tokens, "tokens/model.safetensors")


def load_classifier() -> Classifier:
    """The classifier behind ``class_accuracy`` and ``fd_fashion_cnn``."""
    return _load(Classifier(), "classifier/model.safetensors")


def encode(images: Tensor) -> Tensor:
    """Images [B, 1, 28, 28] in [0, 1] to latents [B, 4, 16, 16] in [-1, 1]; the border is black (-1)."""
    return F.pixel_unshuffle(F.pad(images * 2 - 1, (2, 2, 2, 2), value=-1.0), 2)


def decode(latents: Tensor) -> Tensor:
    """Latents [B, 4, 16, 16] to float images [B, 1, 28, 28] in [0, 1]: `encode` backwards, clamped."""
    return (F.pixel_shuffle(latents, 2)[:, :, 2:-2, 2:-2] / 2 + 0.5).clamp(0, 1)
