"""Transformers over videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.denoisers.entry import FRACTIONS, Denoiser, Draw, grid, ones

# fmt: off
_COG = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4,
        "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
        "patch_size": 2,
        "temporal_compression_ratio": 4, "max_text_seq_length": 8}
_WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4,
        "text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32}
_HUNYUAN = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size_t": 1, "guidance_embeds": True,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)}


def _video(n: Draw, b: int, t: Tensor, channels: int = 4, frames: int = 2, size: int = 8, text: int = 12) -> dict[str,
    Any]:
    return {
        "hidden_states": n(b, channels, frames, size, size), "timestep": t, "encoder_hidden_states": n(b, 5, text)}


def _hunyuan(n: Draw, b: int, t: Tensor, **others: int) -> dict[str, Any]:
    return _video(n, b, t, text=16, **others) | {
        "encoder_attention_mask": ones(b, 5).long(), "pooled_projections": n(b, 8),
        "guidance": torch.full((b,), 6000.0)}


def _rotary(n: Draw, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    return n(tokens, width).cos(), n(tokens, width).sin()


DENOISERS = {
    "AllegroTransformer3DModel": Denoiser(
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1,
         "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8, "sample_frames": 8, "caption_channels": 8},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 2, 8, 8), "timestep": t, "encoder_hidden_states": n(b, 5, 8),
            "encoder_attention_mask": ones(b, 5).long(), "attention_mask": torch.ones(b, 2, 8, 8),
            "image_rotary_emb": _allegro_rotary()},
    ),
    "AnyFlowTransformer3DModel": Denoiser(
        _WAN | {"gate_value": 0.25, "deltatime_type": "r"},
        lambda n, b, t: {
            "hidden_states": n(b, 2, 4, 8, 8), "timestep": t[:, None].expand(b, 2),
            "r_timestep": t[:, None].expand(b, 2) / 2,
            "encoder_hidden_states": n(b, 5, 12)},
    ),
    "AnyFlowFARTransformer3DModel": Denoiser(
        _WAN | {
            "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "gate_value": 0.25, "deltatime_type": "r"},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 4, 8, 8), "timestep": t[:, None].expand(b, 4),
            "r_timestep": t[:, None].expand(b, 4) / 2,
            "encoder_hidden_states": n(b, 5, 12), "chunk_partition": [2, 2]},
    ),
    "ChronoEditTransformer3DModel": Denoiser(
        _WAN | {"qk_norm": "rms_norm_across_heads", "rope_temporal_skip_len": 8},
        lambda n, b, t: _video(n, b, t) | {"encoder_hidden_states_image": None, "attention_kwargs": None},
    ),
    "CogVideoXTransformer3DModel": Denoiser(
        _COG | {"use_rotary_positional_embeddings": True},
        lambda n, b, t: {
            "hidden_states": n(b, 2, 4, 8, 8), "timestep": t, "encoder_hidden_states": n(b, 8, 8),
            "image_rotary_emb": _rotary(n, 32, 8), "attention_kwargs": None},
    ),
    "ConsisIDTransformer3DModel": Denoiser(
        _COG | {
            "num_layers": 1, "cross_attn_interval": 1, "is_kps": False, "is_train_face": True, "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8,
            "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1,
            "LFE_num_scale": 1},
        lambda n, b, t: {
            "hidden_states": n(b, 1, 4, 8, 8), "timestep": t, "encoder_hidden_states": n(b, 8, 8),
            "id_vit_hidden": [n(b, 2, 2)], "id_cond": n(b, 2), "attention_kwargs": None},
    ),
    "CosmosTransformer3DModel": Denoiser(
        {"in_channels": 5, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
         "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2),
         "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False, "extra_pos_embed_type": "learnable"},
        lambda n, b, t: _video(n, b, t, text=16) | {
            "fps": 30, "condition_mask": torch.ones(b, 1, 2, 8, 8), "padding_mask": torch.zeros(1, 1, 8, 8)},
        times=FRACTIONS,
    ),
    "EasyAnimateTransformer3DModel": Denoiser(
        {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 2, "num_layers": 2,
         "out_channels": 4, "patch_size": 2, "sample_height": 60, "sample_width": 90, "text_embed_dim": 16,
         "time_embed_dim": 8, "time_position_encoding_type": "3d_rope", "timestep_activation_fn": "silu"},
        lambda n, b, t: _video(n, b, t, text=16),
    ),
    "HeliosTransformer3DModel": Denoiser(
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
         "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
         "qk_norm": "rms_norm_across_heads", "rope_dim": (4, 4, 4), "has_multi_term_memory_patch": True,
         "guidance_cross_attn": True, "zero_history_timestep": True, "is_amplify_history": False},
        lambda n, b, t: _video(n, b, t, size=16) | {
            "indices_hidden_states": torch.arange(2.0).repeat(b, 1), "indices_latents_history_short": torch.ones(b, 1),
            "indices_latents_history_mid": torch.ones(b, 1), "indices_latents_history_long": torch.ones(b, 4),
            "latents_history_short": n(b, 4, 1, 16, 16), "latents_history_mid": n(b, 4, 1, 16, 16),
            "latents_history_long": n(b, 4, 4, 16, 16)},
    ),
    "HunyuanVideoTransformer3DModel": Denoiser(
        _HUNYUAN | {"patch_size": 1}, lambda n, b, t: _hunyuan(n, b, t) | {"attention_kwargs": None},
    ),
    "HunyuanVideo15Transformer3DModel": Denoiser(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16,
         "text_embed_2_dim": 10, "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16,
         "task_type": "t2v"},
        lambda n, b, t: _video(n, b, t.float(), text=16, size=4) | {
            "encoder_hidden_states_2": n(b, 4, 10), "encoder_attention_mask": ones(b, 5).float(),
            "encoder_attention_mask_2": ones(b, 4).float(), "image_embeds": torch.zeros(b, 3, 12),
            "attention_kwargs": None},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Denoiser(
        _HUNYUAN | {"patch_size": 2, "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True},
        lambda n, b, t: _hunyuan(n, b, t, frames=3, size=4) | {
            "image_embeds": n(b, 4, 12), "indices_latents": torch.ones(3), "latents_clean": n(b, 4, 2, 4, 4),
            "indices_latents_clean": torch.ones(2), "latents_history_2x": n(b, 4, 2, 4, 4),
            "indices_latents_history_2x": torch.ones(2), "latents_history_4x": n(b, 4, 8, 4, 4),
            "indices_latents_history_4x": torch.ones(8), "attention_kwargs": None},
    ),
    "Kandinsky5Transformer3DModel": Denoiser(
        {"in_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4, "model_dim": 32,
         "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        lambda n, b, t: {
            "hidden_states": n(b, 2, 8, 8, 4), "encoder_hidden_states": n(b, 5, 12), "pooled_projections": n(b, 8),
            "timestep": t, "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5), "scale_factor": (1.0, 2.0, 2.0), "sparse_params": None},
    ),
    "Kandinsky6Transformer3DModel": Denoiser(
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 16, "model_dim": 32,
         "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "visual_cond": True,
         "in_audio_dim": 6, "out_audio_dim": 6},
        lambda n, b, t: {
            "hidden_states": n(b, 2, 8, 8, 9), "encoder_hidden_states": n(b, 5, 12), "pooled_projections": n(b, 8),
            "timestep": t, "audio_hidden_states": n(b, 6, 6), "encoder_attention_mask": ones(b, 5),
            "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4))},
    ),
    "Kandinsky6SRTransformer3DModel": Denoiser(
        {"in_visual_dim": 4, "out_visual_dim": 8, "time_dim": 16, "model_dim": 32, "ff_dim": 32, "num_visual_blocks": 2,
         "axes_dims": (4, 6, 6), "nabla_window": (3, 3, 3)},
        lambda n, b, t: {"hidden_states": n(b, 2, 8, 16, 9), "timestep": t},
    ),
    "LatteTransformer3DModel": Denoiser(
        {"sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "caption_channels": 12, "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8, "attention_bias": True,
         "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 2},
        lambda n, b, t: _video(n, b, t) | {"enable_temporal_attentions": True},
    ),
    "LTXVideoTransformer3DModel": Denoiser(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12},
        lambda n, b, t: {
            "hidden_states": n(b, 32, 4), "timestep": t, "encoder_hidden_states": n(b, 5, 12),
            "encoder_attention_mask": ones(b, 5).long(), "num_frames": 2, "height": 4, "width": 4,
            "rope_interpolation_scale": (8 / 25, 32, 32), "attention_kwargs": None},
    ),
    "LTX2VideoTransformer3DModel": Denoiser(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
         "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 12,
         "rope_double_precision": False},
        lambda n, b, t: {
            "hidden_states": n(b, 32, 4), "audio_hidden_states": n(b, 9, 4), "encoder_hidden_states": n(b, 5, 12),
            "audio_encoder_hidden_states": n(b, 5, 12), "timestep": t, "sigma": t,
            "encoder_attention_mask": ones(b, 5).long(), "audio_encoder_attention_mask": ones(b, 5).long(),
            "num_frames": 2, "height": 4, "width": 4, "fps": 25.0, "audio_num_frames": 9, "video_coords": None,
            "isolate_modalities": False, "spatio_temporal_guidance_blocks": None, "perturbation_mask": None,
            "use_cross_timestep": False, "attention_kwargs": None},
        roles={"hidden_states": "sample", "audio_hidden_states": "sample", "timestep": "time", "sigma": "time"},
    ),
    "MiniMaxH3Transformer3DModel": Denoiser(
        {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2,
         "num_refiner_layers": 2,
         "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "patch_size": (1, 2, 2), "text_dim": 8, "freq_dim": 8,
         "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2},
        lambda n, b, t: {
            "hidden_states": n(b, 8, 16), "audio_hidden_states": n(b, 6, 6), "encoder_hidden_states": n(b, 4, 8),
            "timestep": torch.stack([t[0], t[0] / 2]), "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * 8),
            "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 8),
            "position_ids": torch.arange(54.0).reshape(18, 3) % 7,
            "text_indices": torch.arange(4), "audio_indices": torch.arange(4, 10),
            "video_indices": torch.arange(10, 18)},
        times=FRACTIONS,
        roles={"hidden_states": "sample", "audio_hidden_states": "sample", "timestep": "sample"},
    ),
    "MochiTransformer3DModel": Denoiser(
        {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "pooled_projection_dim": 16,
         "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "activation_fn": "swiglu",
         "max_sequence_length": 5},
        lambda n, b, t: _video(n, b, t, text=16) | {"encoder_attention_mask": ones(b, 5), "attention_kwargs": None},
    ),
    "MotifVideoTransformer3DModel": Denoiser(
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
         "num_single_layers": 1, "num_decoder_layers": 1, "patch_size": 1, "patch_size_t": 1, "qk_norm": "rms_norm",
         "text_embed_dim": 12, "image_embed_dim": 4, "rope_axes_dim": (4, 4, 4)},
        lambda n, b, t: _video(n, b, t, channels=9, size=4) | {
            "encoder_attention_mask": ones(b, 5), "attention_kwargs": None},
    ),
    "SanaVideoTransformer3DModel": Denoiser(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
         "caption_channels": 12, "sample_size": 8, "patch_size": (1, 2, 2), "qk_norm": "rms_norm_across_heads",
         "rope_max_seq_len": 32},
        lambda n, b, t: _video(n, b, t) | {"encoder_attention_mask": ones(b, 5).long(), "attention_kwargs": None},
    ),
    "SanaWMTransformer3DModel": Denoiser(
        {"in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
         "linear_head_dim": 16, "chunk_plucker_channels": 6, "chunk_plucker_post_attn_blocks": 2, "image_size": 64,
         "caption_channels": 12},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 2, 4, 4), "timestep": t[:, None, None].expand(b, 1, 2),
            "encoder_hidden_states": n(b, 1, 5, 12), "encoder_attention_mask": ones(b, 5).long(),
            "camera_conditions": _cameras(b, 2), "chunk_plucker": n(b, 6, 2, 4, 4)},
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Denoiser(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
         "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 12,
         "rope_double_precision": False},
        lambda n, b, t: {
            "hidden_states": n(b, 32, 4), "encoder_hidden_states": n(b, 5, 12),
            "timestep": t[:, None].expand(b, 32), "video_rotary_emb": (n(b, 32, 16).cos(), n(b, 32, 16).sin()),
            "encoder_attention_mask": ones(b, 5).long(), "kv_cache": None, "kv_cache_mode": None},
    ),
    "SkyReelsV2Transformer3DModel": Denoiser(
        _WAN | {"qk_norm": "rms_norm_across_heads"},
        lambda n, b, t: _video(n, b, t) | {"attention_kwargs": None},
    ),
    "WanTransformer3DModel": Denoiser(
        _WAN | {"qk_norm": "rms_norm_across_heads"},
        lambda n, b, t: _video(n, b, t) | {"attention_kwargs": None},
    ),
    "WanVACETransformer3DModel": Denoiser(
        _WAN | {"qk_norm": "rms_norm_across_heads", "vace_layers": [0, 1], "vace_in_channels": 12},
        lambda n, b, t: _video(n, b, t) | {
            "control_hidden_states": n(b, 12, 2, 8, 8), "control_hidden_states_scale": torch.ones(2),
            "attention_kwargs": None},
    ),
    "WanAnimateTransformer3DModel": Denoiser(
        _WAN | {
            "in_channels": 12, "latent_channels": 4, "qk_norm": "rms_norm_across_heads", "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8,
            "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2},
        lambda n, b, t: _video(n, b, t, channels=12, frames=3, size=4) | {
            "encoder_hidden_states_image": n(b, 4, 16), "pose_hidden_states": n(b, 4, 2, 4, 4),
            "face_pixel_values": n(b, 3, 5, 16, 16), "attention_kwargs": None},
    ),
    "WanAnimate2Transformer3DModel": Denoiser(
        {"patch_size": (1, 2, 2), "text_len": 8, "in_dim": 16, "dim": 64, "ffn_dim": 32, "freq_dim": 16, "text_dim": 12,
         "out_dim": 8, "num_heads": 4, "num_layers": 2, "use_img_emb": True},
        lambda n, b, t: {
            "hidden_states": [n(8, 3, 4, 4) for _ in range(b)], "timestep": t,
            "encoder_hidden_states": [n(5, 12) for _ in range(b)],
            "condition_latents": [n(8, 3, 4, 4) for _ in range(b)],
            "encoder_hidden_states_image": n(b, 4, 1280), "kv_cache": _cache(n, b), "kv_cache_mode": "cached",
            "seq_len": 12, "reference_grid_sizes": torch.tensor([[2, 2, 2]] * b), "origin_len": 5,
            "origin_area": [32, 32]},
    ),
}


def _allegro_rotary() -> tuple[Any, Any]:
    """What Allegro's pipeline makes once: frequencies of each axis, and positions in it."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frequencies = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 2)[:3]
    return frequencies, tuple(axis[None] for axis in grid(2, 4, 4).long().T)


def _cameras(b: int, frames: int) -> Tensor:
    """[b, frames, 20]: pose 4 x 4, focal lengths and centre."""
    return torch.cat([torch.eye(4).flatten(), torch.tensor([3.0, 3.0, 2.0, 2.0])]).repeat(b, frames, 1)


def _cache(n: Draw, b: int) -> Any:
    """Keys and values of the reference's 8 tokens, in each of two layers."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(n(b, 8, 4, 16), n(b, 8, 4, 16))
    return cache
