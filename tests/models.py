"""Denoisers at the architectures that users have, small, with seeded random weights, and some written by hand.

`MODELS` maps a name to a function that returns the model in eval mode and example inputs of batch 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with every parameter random: zeros (adaLN-zero) would make features constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.dim() < 2 or not bool(parameter.any()):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


TIMES = torch.tensor([7, 421])


# -- diffusers -----------------------------------------------------------------------------------------------


def unet2d(time_scale_shift: str = "default", classes: int | None = None) -> Example:
    """Two levels, attention in the lower; `scale_shift` norms; `classes` adds a class embedding."""
    model = _seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
            resnet_time_scale_shift=time_scale_shift,
            num_class_embeds=classes,
        )
    )  # fmt: skip
    labels = {} if classes is None else {"class_labels": torch.tensor([1, classes - 1])}
    return model, {"sample": _noise(2, 3, 8, 8), "timestep": TIMES, **labels}


_CONDITIONAL: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 12,
}  # fmt: skip


def unet_sd() -> Example:
    """The blocks of Stable Diffusion 1.x."""
    model = _seeded(
        lambda: diffusers.UNet2DConditionModel(
            **_CONDITIONAL,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
        )
    )  # fmt: skip
    inputs = {"sample": _noise(2, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": _noise(2, 5, 12)}
    return model, inputs


def unet_sdxl() -> Example:
    """The blocks of SDXL: pooled text and size ids beside the timestep, linear projections."""
    model = _seeded(
        lambda: diffusers.UNet2DConditionModel(
            **_CONDITIONAL,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 10,
        )
    )  # fmt: skip
    added = {
        "text_embeds": _noise(2, 10),
        "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0], [32.0, 64.0, 8.0, 0.0, 32.0, 64.0]]),
    }
    inputs = {"sample": _noise(2, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": _noise(2, 5, 12)}
    return model, {**inputs, "added_cond_kwargs": added}


def dit() -> Example:
    """DiT: time and class label through adaLN-zero."""
    model = _seeded(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        )
    )  # fmt: skip
    inputs = {"hidden_states": _noise(2, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 9])}
    return model, inputs


def pixart() -> Example:
    """PixArt-alpha: one shared modulation, added to a table in every block; text with a mask."""
    model = _seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=16,
            caption_channels=12,
            num_embeds_ada_norm=1000,
            norm_num_groups=4,
            use_additional_conditions=False,
        )
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(2, 4, 8, 8),
        "encoder_hidden_states": _noise(2, 5, 12),
        "timestep": TIMES,
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


def sd3() -> Example:
    """SD 3: joint attention of image and text streams, pooled text beside the timestep."""
    model = _seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            pos_embed_max_size=8,
        )
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(2, 4, 8, 8),
        "encoder_hidden_states": _noise(2, 5, 12),
        "pooled_projections": _noise(2, 10),
        "timestep": TIMES,
    }


def flux(guidance: bool = False) -> Example:
    """Flux: double and single stream blocks, rotary positions, optionally distilled guidance."""
    model = _seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    inputs = {
        "hidden_states": _noise(2, 16, 4),
        "encoder_hidden_states": _noise(2, 5, 12),
        "pooled_projections": _noise(2, 10),
        "timestep": TIMES / 1000,
        "img_ids": torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs | ({"guidance": torch.tensor([3.5, 4.0])} if guidance else {})


# -- written by hand -----------------------------------------------------------------------------------------


class OddNames(nn.Module):
    """A denoiser in nobody's vocabulary: `a` is the noisy sample, `b` the time."""

    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Conv2d(2, 8, 3, padding=1)
        self.omega = nn.Linear(4, 8)
        self.qux = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        powers = torch.stack([(b.float() / 1000) ** k for k in range(1, 5)], dim=1)
        return self.qux(F.silu(self.zeta(a) + self.omega(powers)[:, :, None, None]))


class Chain(nn.Module):
    """The time takes a way that no name gives away: a matrix product, a list, a request input."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 12)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("frequencies", torch.logspace(0, -3, 6))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        shared: list[Tensor] = [torch.sin(t[:, None] * self.frequencies) @ self.mix]
        shared.append(torch.tanh(self.first(shared[0])))
        both = self.second(shared[1])
        scale, shift = both.chunk(2, dim=-1)
        condition = torch.cat([shared[0][:, :3], text[:, 3:]], dim=1)  # waits for time and text
        return self.outer(self.inner(x) * (1 + scale) + shift + condition)


class InPlace(nn.Module):
    """Works in place on intermediate values, on the way of the time and of the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Linear(1, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.embed(t.float()[:, None] / 1000)
        embedding.mul_(2.0)
        hidden = self.inner(x)
        hidden += embedding
        F.relu(hidden, inplace=True)
        return hidden.add_(x)


class Timeless(nn.Module):
    """A model without a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def odd_names() -> Example:
    """Needs roles: see `ROLES`."""
    return _seeded(OddNames), {"a": _noise(2, 2, 6, 6), "b": TIMES}


def chain() -> Example:
    """Two features wait for the time alone, one for the text too."""
    return _seeded(Chain), {"x": _noise(2, 6), "t": TIMES, "text": _noise(2, 6)}


def in_place() -> Example:
    """Sample and time of vectors."""
    return _seeded(InPlace), {"x": _noise(2, 6), "t": TIMES}


def timeless() -> Example:
    """Not in `MODELS`: it has no time, so no temporal features."""
    return _seeded(Timeless), {"x": _noise(2, 6)}


MODELS: dict[str, Callable[[], Example]] = {
    "unet2d": unet2d,
    "unet2d-scale-shift": partial(unet2d, "scale_shift"),
    "unet2d-classes": partial(unet2d, classes=10),
    "unet-sd": unet_sd,
    "unet-sdxl": unet_sdxl,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "flux-guidance": partial(flux, guidance=True),
    "odd-names": odd_names,
    "chain": chain,
    "in-place": in_place,
}

ROLES: dict[str, dict[str, str]] = {"odd-names": {"a": "sample", "b": "time"}}
