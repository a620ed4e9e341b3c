"""Example inputs of diffusers denoisers, from their configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from tfqc.errors import CaptureError


def example_inputs(model: torch.nn.Module, batch: int = 2) -> dict[str, Any]:
    """Keyword arguments of the right shapes and in the weights' dtype, by the class of the model.

    Raises:
        CaptureError: the class is not known; its inputs must be given.
    """
    config: Any = getattr(model, "config", None)
    make = _EXAMPLES.get(type(model).__name__)
    if config is None or make is None:
        raise CaptureError(
            f"The inputs of a {type(model).__name__} are not known: give example_inputs "
            f"(known classes: {', '.join(_EXAMPLES)})."
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, make(config, batch)
    )


def _latent(config: Any, batch: int) -> torch.Tensor:
    size = config.sample_size or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(batch, config.in_channels, height, width)


def _time(batch: int) -> torch.Tensor:
    return torch.full((batch,), 10)


def _unet2d(config: Any, batch: int) -> dict[str, Any]:
    inputs = {"sample": _latent(config, batch), "timestep": _time(batch)}
    if config.num_class_embeds or config.class_embed_type == "timestep":
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    return inputs


def _unet2d_condition(config: Any, batch: int) -> dict[str, Any]:
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) else width
    inputs: dict[str, Any] = {
        "sample": _latent(config, batch),
        "timestep": _time(batch),
        "encoder_hidden_states": torch.randn(batch, 77, width),
    }
    if config.addition_embed_type == "text_time":
        ids = 6
        text = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        extra = {"text_embeds": torch.randn(batch, text), "time_ids": torch.zeros(batch, ids)}
        inputs["added_cond_kwargs"] = extra
    return inputs


def _dit(config: Any, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latent(config, batch),
        "timestep": _time(batch),
        "class_labels": torch.zeros(batch, dtype=torch.int64),
    }


def _pixart(config: Any, batch: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "hidden_states": _latent(config, batch),
        "timestep": _time(batch),
        "encoder_hidden_states": torch.randn(batch, 120, config.caption_channels),
    }
    if config.use_additional_conditions:
        size = torch.full((batch, 2), 1024.0)
        inputs["added_cond_kwargs"] = {"resolution": size, "aspect_ratio": torch.ones(batch, 1)}
    else:
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return inputs


def _sd3(config: Any, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latent(config, batch),
        "timestep": _time(batch),
        "encoder_hidden_states": torch.randn(batch, 154, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
    }


def _flux(config: Any, batch: int) -> dict[str, Any]:
    side = 16
    axis = torch.arange(side)
    grid = torch.stack([torch.zeros(side, side), *torch.meshgrid(axis, axis, indexing="ij")], dim=-1)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, side * side, config.in_channels),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, 512, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "img_ids": grid.reshape(-1, 3),
        "txt_ids": torch.zeros(512, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


_EXAMPLES = {
    "UNet2DModel": _unet2d,
    "UNet2DConditionModel": _unet2d_condition,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
