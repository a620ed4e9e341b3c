"""Complete pipelines of diffusers with random weights, small enough to run in a test; each with its own scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 32


def tokenizer(directory: Path) -> Any:
    """CLIP's, with single characters for words."""
    words = ["<|startoftext|>", "<|endoftext|>"]
    words += [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789,." for end in ("", "</w>")]
    (directory / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
    return CLIPTokenizer(*files, unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=16)


def text_encoder(projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels: int = 4) -> Any:
    return AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, shift_factor=0.1,
    ).eval()  # fmt: skip


def unet(**more: Any) -> Any:
    return UNet2DConditionModel(
        **{
            "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 32), "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8, **more,
        }
    ).eval()  # fmt: skip


def sd(directory: Path) -> Any:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        vae(), text_encoder(), tokenizer(directory), unet(), scheduler, None, None, requires_safety_checker=False
    )


def sdxl(directory: Path) -> Any:
    model = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=2 * WIDTH,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )  # fmt: skip
    words = tokenizer(directory)
    encoders = (text_encoder(), text_encoder(projected=True))
    return StableDiffusionXLPipeline(vae(), *encoders, words, words, model, EulerDiscreteScheduler())


def ddpm(directory: Path) -> Any:
    model = UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    return DDPMPipeline(model, DDPMScheduler())


def sd3(directory: Path) -> Any:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
    ).eval()  # fmt: skip
    words = tokenizer(directory)
    encoders = (text_encoder(projected=True), words, text_encoder(projected=True), words, None, None)
    return StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), *encoders)


def flux(directory: Path) -> Any:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, vae(4), text_encoder(), tokenizer(directory), None, None, model)


def pixart(directory: Path) -> Any:
    model = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=WIDTH,
        in_channels=4, out_channels=8, cross_attention_dim=32, norm_num_groups=8,
    ).eval()  # fmt: skip
    return PixArtSigmaPipeline(None, None, vae(), model, DPMSolverMultistepScheduler())  # pyright: ignore


def embedded(*names: str, masks: tuple[str, ...] = (), length: int = 6) -> dict[str, Any]:
    """Text that is embedded already, under the pipeline's names for it."""
    torch.manual_seed(5)
    shapes = {name: (1, WIDTH) if "pooled" in name else (1, length, WIDTH) for name in names}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {m: torch.ones(1, length) for m in masks}


ANY_PROMPT = {"prompt": "a red fox"}
PIPELINES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "sd": (sd, ANY_PROMPT),
    "sdxl": (sdxl, ANY_PROMPT),
    "ddpm": (ddpm, {}),
    "sd3": (sd3, {**ANY_PROMPT, "height": 16, "width": 16}),
    "flux": (flux, {**embedded("prompt_embeds", "pooled_prompt_embeds"), "height": 16, "width": 16}),
    "pixart": (pixart, {
        **embedded("prompt_embeds", "negative_prompt_embeds",
                   masks=("prompt_attention_mask", "negative_prompt_attention_mask")),
        "height": 16, "width": 16, "negative_prompt": None, "use_resolution_binning": False,
    }),
}  # fmt: skip


def pipeline(name: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    """One of them, the same weights each time, and keyword arguments of a call."""
    torch.manual_seed(0)
    make, call = PIPELINES[name]
    made = make(directory)
    made.set_progress_bar_config(disable=True)
    return made, dict(call)
