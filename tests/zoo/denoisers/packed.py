"""Transformers over packed image tokens [B, S, C], with positions beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.denoisers.entry import FRACTIONS, Denoiser, Draw, grid, ones

# fmt: off
_FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12}


def _tokens(n: Draw, b: int, t: Tensor, axes: int = 3) -> dict[str, Any]:
    """16 image tokens, 5 text tokens, a row of positions for each, the same for all images."""
    return {
        "hidden_states": n(b, 16, 4), "timestep": t, "encoder_hidden_states": n(b, 5, 12),
        "txt_ids": torch.zeros(5, axes), "img_ids": grid(1, 4, 4, *[1] * (axes - 3)),
    }


def _kwargs(n: Draw, b: int, t: Tensor) -> dict[str, Any]:
    return _tokens(n, b, t) | {"joint_attention_kwargs": None}


def _qwen(n: Draw, b: int, t: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": n(b, 16, 16), "timestep": t, "encoder_hidden_states": n(b, 5, 12),
        "encoder_hidden_states_mask": ones(b, 5), "img_shapes": [[(1, 4, 4)]] * b, "attention_kwargs": {}}


def _ideogram(n: Draw, b: int, t: Tensor) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_ideogram4 import (
        IMAGE_POSITION_OFFSET,
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )

    text, image = torch.arange(4)[:, None].expand(4, 3), grid(1, 2, 2).long() + IMAGE_POSITION_OFFSET
    indicator = torch.tensor([LLM_TOKEN_INDICATOR] * 4 + [OUTPUT_IMAGE_INDICATOR] * 4)
    return {
        "hidden_states": torch.cat([torch.zeros(b, 4, 16), n(b, 4, 16)], 1), "timestep": t,
        "encoder_hidden_states": torch.cat([n(b, 4, 24), torch.zeros(b, 4, 24)], 1),
        "position_ids": torch.cat([text, image]).repeat(b, 1, 1), "segment_ids": torch.ones(b, 8).long(),
        "indicator": indicator.repeat(b, 1)}


DENOISERS = {
    "FluxTransformer2DModel": Denoiser(
        _FLUX | {"pooled_projection_dim": 10, "axes_dims_rope": [4, 4, 8], "guidance_embeds": True},
        lambda n, b, t: _kwargs(n, b, t) | {"pooled_projections": n(b, 10), "guidance": torch.full((b,), 3.5)},
        times=FRACTIONS,
    ),
    "Flux2Transformer2DModel": Denoiser(
        _FLUX | {"timestep_guidance_channels": 256, "axes_dims_rope": [4, 4, 4, 4]},
        lambda n, b, t: _kwargs(n, b, t) | {
            "img_ids": grid(1, 4, 4, 1).repeat(b, 1, 1), "txt_ids": grid(1, 1, 1, 5).repeat(b, 1, 1),
            "guidance": torch.full((b,), 3.5)},
        times=FRACTIONS,
    ),
    "Flux3Transformer2DModel": Denoiser(
        {"in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        lambda n, b, t: _tokens(n, b, t, axes=4) | {"attention_kwargs": None},
        times=FRACTIONS,
    ),
    "BriaTransformer2DModel": Denoiser(
        _FLUX | {"attention_head_dim": 8, "pooled_projection_dim": None, "axes_dims_rope": [0, 4, 4]},
        lambda n, b, t: _tokens(n, b, t) | {"attention_kwargs": None},
    ),
    "BriaFiboTransformer2DModel": Denoiser(
        _FLUX | {
            "attention_head_dim": 8, "joint_attention_dim": 16, "text_encoder_dim": 8, "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4]},
        lambda n, b, t: _tokens(n, b, t) | {
            "encoder_hidden_states": n(b, 5, 16), "text_encoder_layers": [n(b, 5, 8), n(b, 5, 8)],
            "joint_attention_kwargs": {}},
    ),
    "ChromaTransformer2DModel": Denoiser(
        _FLUX | {
            "axes_dims_rope": [4, 4, 8], "approximator_num_channels": 8, "approximator_hidden_dim": 16,
            "approximator_layers": 1},
        lambda n, b, t: _kwargs(n, b, t) | {"attention_mask": torch.cat([ones(b, 5), torch.ones(b, 16).bool()], 1)},
        times=FRACTIONS,
    ),
    "LongCatImageTransformer2DModel": Denoiser(
        _FLUX | {"pooled_projection_dim": 10, "axes_dims_rope": [4, 4, 8]},
        lambda n, b, t: _tokens(n, b, t) | {"guidance": None}, times=FRACTIONS,
    ),
    "OvisImageTransformer2DModel": Denoiser(
        _FLUX | {"out_channels": 4, "axes_dims_rope": (4, 4, 8)}, _tokens, times=FRACTIONS,
    ),
    "QwenImageTransformer2DModel": Denoiser(
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (8, 4, 4)},
        lambda n, b, t: _qwen(n, b, t) | {"guidance": None}, times=FRACTIONS,
    ),
    "QwenImage21Transformer2DModel": Denoiser(
        {"in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "context_in_dim": 12, "axes_dims_rope": (4, 6, 6), "causal_condition": True},
        lambda n, b, t: _qwen(n, b, t) | {
            "img_mask": torch.tensor([[False] * 5 + [True] * 4] * b), "encoder_hidden_states_mask": None,
            "attention_kwargs": None, "kv_cache": None},
        times=FRACTIONS,
    ),
    "NucleusMoEImageTransformer2DModel": Denoiser(
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (8, 4, 4), "moe_enabled": True,
         "dense_moe_strategy": "all_moe",
         # Each expert takes every token: choices of random gates are nearly ties, and noise of a thousandth in the
         # sample moves the answer by an eighth where one of them turns.
         "num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": [4.0, 4.0]},
        lambda n, b, t: _qwen(n, b, t) | {"img_shapes": [(1, 4, 4)] * b, "attention_kwargs": None}, times=FRACTIONS,
    ),
    "Ideogram4Transformer2DModel": Denoiser(
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "intermediate_size": 32,
         "adaln_dim": 16, "llm_features_dim": 24, "mrope_section": (2, 1, 1)},
        _ideogram, times=FRACTIONS,
    ),
    "Krea2Transformer2DModel": Denoiser(
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
         "num_key_value_heads": 2,
         "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 3,
         "text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 16,
         "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2),
         "rope_theta": 1000.0},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 16), "timestep": t, "encoder_hidden_states": n(b, 5, 3, 16),
            "position_ids": torch.cat([torch.zeros(5, 3), grid(1, 2, 2)]), "encoder_attention_mask": ones(b, 5),
            "attention_kwargs": None},
        times=FRACTIONS,
    ),
}
