"""Complete pipelines of diffusers with random weights, small enough to run in a test; each with its own scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_motion_model import MotionAdapter
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.pipelines.animatediff.pipeline_animatediff import AnimateDiffPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import StableVideoDiffusionPipeline
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from transformers import CLIPImageProcessor

from tests.integrations.parts import (
    WIDTH,
    chat_model,
    chat_tokenizer,
    embedded,
    image_encoder,
    picture,
    t5,
    text_encoder,
    tokenizer,
    unet,
    vae,
    video_transformer,
    video_vae,
)


def sd(directory: Path) -> Any:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return _sd(StableDiffusionPipeline, directory, unet(), scheduler)


def _sd(kind: Any, directory: Path, *own: Any) -> Any:
    return kind(vae(), text_encoder(), tokenizer(directory), *own, None, None, requires_safety_checker=False)


def img2img(directory: Path) -> Any:
    return _sd(StableDiffusionImg2ImgPipeline, directory, unet(), PNDMScheduler(skip_prk_steps=True))


def inpaint(directory: Path) -> Any:
    return _sd(StableDiffusionInpaintPipeline, directory, unet(in_channels=9), PNDMScheduler(skip_prk_steps=True))


def lcm(directory: Path) -> Any:
    return _sd(LatentConsistencyModelPipeline, directory, unet(time_cond_proj_dim=16), LCMScheduler())


def controlnet(directory: Path) -> Any:
    model = unet()
    control: Any = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(16, 32)).eval()
    for parameter in control.controlnet_down_blocks.parameters():  # which are zeros before training
        torch.nn.init.normal_(parameter, std=0.02)
    return _sd(StableDiffusionControlNetPipeline, directory, model, control, DDIMScheduler(clip_sample=False))


def animatediff(directory: Path) -> Any:
    adapter = MotionAdapter(
        block_out_channels=(32, 32), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    ).eval()
    parts = (vae(), text_encoder(), tokenizer(directory), unet(), adapter)
    return AnimateDiffPipeline(*parts, DDIMScheduler(beta_schedule="linear", clip_sample=False))


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


def dit(directory: Path) -> Any:
    model = DiTTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
    ).eval()  # fmt: skip
    return DiTPipeline(model, vae(), DDIMScheduler())


def wan(directory: Path) -> Any:
    """With a time for each token, as Wan 2.2 of 5 B has it; `experts` has one for each video."""
    parts = (tokenizer(directory), t5(), video_vae(), FlowMatchEulerDiscreteScheduler(shift=7.0), video_transformer())
    return WanPipeline(*parts, expand_timesteps=True)


def experts(directory: Path) -> Any:
    """Two denoisers: one for high noise, one for low."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    models = (video_transformer(), video_transformer())
    return WanPipeline(tokenizer(directory), t5(), video_vae(), scheduler, *models, boundary_ratio=0.875)


def svd(directory: Path) -> Any:
    """A video from an image: it has frames before channels, and a guidance for each frame."""
    del directory
    model = UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), num_attention_heads=4,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ).eval()  # fmt: skip
    decoder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
    ).eval()  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002, timestep_spacing="leading", steps_offset=1,
        timestep_type="continuous", use_karras_sigmas=True, beta_schedule="scaled_linear",
    )  # fmt: skip
    extractor = CLIPImageProcessor(crop_size=16, size=16)
    return StableVideoDiffusionPipeline(decoder, image_encoder(), model, scheduler, extractor)


def z_image(directory: Path) -> Any:
    """Its denoiser takes lists with an image, and the tokens of a text, in each entry."""
    model = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    for token in (model.x_pad_token, model.cap_pad_token):  # which are whatever was in memory
        torch.nn.init.normal_(token, std=0.02)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), chat_model(), chat_tokenizer(), model)


ANY_PROMPT = {"prompt": "a red fox"}
VIDEO = {**ANY_PROMPT, "height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}
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
    "img2img": (img2img, {**ANY_PROMPT, "image": picture(), "strength": 0.8}),
    "inpaint": (inpaint, {
        **ANY_PROMPT, "image": picture(), "mask_image": picture(1).round(), "height": 16, "width": 16,
    }),
    "controlnet": (controlnet, {**ANY_PROMPT, "image": picture()}),
    "lcm": (lcm, {**ANY_PROMPT, "height": 16, "width": 16}),
    "animatediff": (animatediff, {**ANY_PROMPT, "num_frames": 2}),
    "dit": (dit, {"class_labels": [1]}),
    "wan": (wan, VIDEO),
    "experts": (experts, VIDEO),
    "svd": (svd, {"image": picture(), "num_frames": 2, "height": 16, "width": 16}),
    "z_image": (z_image, {**ANY_PROMPT, "height": 16, "width": 16}),
}  # fmt: skip


def pipeline(name: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    """One of them, the same weights each time, and keyword arguments of a call."""
    torch.manual_seed(0)
    make, call = PIPELINES[name]
    made = make(directory)
    made.set_progress_bar_config(disable=True)
    return made, dict(call)
