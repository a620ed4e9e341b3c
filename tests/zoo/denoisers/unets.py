"""UNets."""

from __future__ import annotations

import torch

from tests.zoo.denoisers.entry import THOUSANDS, Denoiser

# fmt: off
_SMALL = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
    "norm_num_groups": 8, "cross_attention_dim": 12,
}
_TEXT = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",
    "CrossAttnUpBlock2D")}

DENOISERS = {
    "UNet1DModel": Denoiser(
        {"block_out_channels": (8, 8, 16, 16), "in_channels": 14, "out_channels": 14,
         "time_embedding_type": "positional",
         "use_timestep_embedding": True, "flip_sin_to_cos": False, "freq_shift": 1.0,
         "out_block_type": "OutConv1DBlock",
         "mid_block_type": "MidResTemporalBlock1D", "act_fn": "swish", "down_block_types": ["DownResnetBlock1D"] * 4,
         "up_block_types": ["UpResnetBlock1D"] * 3},
        lambda n, b, t: {"sample": n(b, 14, 16), "timestep": t},
    ),
    "UNet2DModel": Denoiser(
        {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
         "norm_num_groups": 8, "attention_head_dim": 8},
        lambda n, b, t: {"sample": n(b, 3, 8, 8), "timestep": t[0]},
    ),
    "UNet2DConditionModel": Denoiser(
        _SMALL | _TEXT | {
            "attention_head_dim": (2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34},
        lambda n, b, t: {
            "sample": n(b, 4, 8, 8), "timestep": t[0], "encoder_hidden_states": n(b, 5, 12), "timestep_cond": None,
            "cross_attention_kwargs": None,
            "added_cond_kwargs": {"text_embeds": n(b, 10), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * b)}},
    ),
    "UNet3DConditionModel": Denoiser(
        _SMALL | {
            "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        lambda n, b, t: {"sample": n(b, 4, 3, 8, 8), "timestep": t[0], "encoder_hidden_states": n(b, 5, 12)},
    ),
    "DreamLiteUNetModel": Denoiser(
        _SMALL | {
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), "attention_head_dim": 4},
        lambda n, b, t: {"sample": n(b, 4, 8, 8), "timestep": t[0], "encoder_hidden_states": n(b, 5, 12)},
    ),
    "I2VGenXLUNet": Denoiser(
        _SMALL | {
            "num_attention_heads": 2, "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        lambda n, b, t: {
            "sample": n(b, 4, 3, 8, 8), "timestep": t[0], "fps": torch.full((b,), 16),
            "image_latents": n(b, 4, 3, 8, 8),
            "image_embeddings": n(b, 12), "encoder_hidden_states": n(b, 5, 12)},
    ),
    "Kandinsky3UNet": Denoiser(
        {"in_channels": 4, "time_embedding_dim": 16, "groups": 4, "attention_head_dim": 4, "layers_per_block": 2,
         "block_out_channels": (48, 48, 48, 96),  # six channels a group, as released
         "cross_attention_dim": 12, "encoder_hid_dim": 10},
        lambda n, b, t: {
            "sample": n(b, 4, 16, 16), "timestep": t[0], "encoder_hidden_states": n(b, 5, 10),
            "encoder_attention_mask": torch.ones(b, 5)},
    ),
    "UNetMotionModel": Denoiser(
        _SMALL | {
            "num_attention_heads": 2, "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
        lambda n, b, t: {
            "sample": n(b, 4, 3, 8, 8), "timestep": t[0],
            "encoder_hidden_states": n(b, 5, 12).repeat_interleave(3, dim=0), "cross_attention_kwargs": None},
    ),
    "UNetSpatioTemporalConditionModel": Denoiser(
        {"sample_size": 8, "in_channels": 8, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "cross_attention_dim": 12,
         "num_attention_heads": 2, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24},
        lambda n, b, t: {
            "sample": n(b, 2, 8, 8, 8), "timestep": t[0], "encoder_hidden_states": n(b, 1, 12),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * b)},
    ),
    "StableCascadeUNet": Denoiser(
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
         "block_out_channels": (16, 32), "num_attention_heads": (2, 4), "down_num_layers_per_block": (1, 1),
         "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 12, "clip_text_pooled_in_channels": 10,
         "clip_image_in_channels": 6, "dropout": (0.1, 0.1), "switch_level": (False,)},
        lambda n, b, t: {
            "sample": n(b, 4, 8, 8), "timestep_ratio": t / 1000, "clip_text_pooled": n(b, 1, 10),
            "clip_text": n(b, 5, 12), "clip_img": n(b, 1, 6)},
        times=tuple(t / 1000 for t in THOUSANDS), roles={"sample": "sample", "timestep_ratio": "time"},
    ),
    "UVit2DModel": Denoiser(
        {"hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
         "encoder_hidden_size": 12, "vocab_size": 30, "codebook_size": 24, "in_channels": 16, "block_out_channels": 16,
         "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "sample_size": 8},
        lambda n, b, t: {
            "input_ids": n.ids(24, b, 8, 8), "encoder_hidden_states": n(b, 5, 12), "pooled_text_emb": n(b, 8),
            "micro_conds": n(b, 5), "cross_attention_kwargs": None},
        times=None, roles={"input_ids": "sample"},
    ),
    "UNetControlNetXSModel": Denoiser(
        {"sample_size": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16),
         "cross_attention_dim": 12,
         "transformer_layers_per_block": 1, "num_attention_heads": 2, "norm_num_groups": 4,
         "ctrl_block_out_channels": [4, 8], "ctrl_num_attention_heads": 4, "ctrl_max_norm_num_groups": 4,
         "ctrl_conditioning_embedding_out_channels": (2, 2)},
        lambda n, b, t: {
            "sample": n(b, 4, 8, 8), "timestep": t[0], "encoder_hidden_states": n(b, 5, 12),
            "controlnet_cond": n(b, 3, 16, 16), "conditioning_scale": 1.0, "cross_attention_kwargs": None,
            "apply_control": True},
    ),
}
