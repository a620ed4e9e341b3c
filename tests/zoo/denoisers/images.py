"""Transformers over grids of latents: images as [B, C, H, W]."""

from __future__ import annotations

import torch

from tests.zoo.denoisers.entry import FRACTIONS, Denoiser, ones

# fmt: off
_SIZES = {"original_size": torch.tensor([64, 64]), "target_size": torch.tensor([64, 64]),
    "crop_coords": torch.tensor([0, 0])}


def _sizes(b: int) -> dict[str, torch.Tensor]:
    return {name: size.repeat(b, 1) for name, size in _SIZES.items()}


DENOISERS = {
    "DiTTransformer2DModel": Denoiser(
        {"in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "num_embeds_ada_norm": 10, "patch_size": 2, "sample_size": 8, "norm_num_groups": 4},
        lambda n, b, t: {"hidden_states": n(b, 4, 8, 8), "timestep": t, "class_labels": n.ids(10, b)},
    ),
    "PixArtTransformer2DModel": Denoiser(
        {"sample_size": 8, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4,
         "cross_attention_dim": 16, "out_channels": 8, "use_additional_conditions": False, "caption_channels": 12,
         "norm_num_groups": 4},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "timestep": t, "encoder_hidden_states": n(b, 5, 12),
            "encoder_attention_mask": ones(b, 5).long(), "added_cond_kwargs": {"resolution": None,
            "aspect_ratio": None}},
    ),
    "Transformer2DModel": Denoiser(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
         "sample_size": 8, "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 10,
         "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_num_groups": 4, "attention_bias": True},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "timestep": t, "class_labels": n.ids(10, b),
            "cross_attention_kwargs": None},
    ),
    "HunyuanDiT2DModel": Denoiser(
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4,
         "hidden_size": 16, "text_len": 4, "text_len_t5": 4, "activation_fn": "gelu-approximate"},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "timestep": t.float(), "encoder_hidden_states": n(b, 4, 8),
            "text_embedding_mask": ones(b, 4).float(), "encoder_hidden_states_t5": n(b, 4, 8),
            "text_embedding_mask_t5": ones(b, 4).float(),
            "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * b), "style": torch.zeros(b).long(),
            "image_rotary_emb": (n(16, 8), n(16, 8))},
    ),
    "SD3Transformer2DModel": Denoiser(
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 12, "pooled_projection_dim": 10,
         "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "timestep": t, "encoder_hidden_states": n(b, 5, 12),
            "pooled_projections": n(b, 10), "joint_attention_kwargs": None},
    ),
    "AuraFlowTransformer2DModel": Denoiser(
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 12,
         "out_channels": 4, "pos_embed_max_size": 64},
        lambda n, b, t: {"hidden_states": n(b, 4, 8, 8), "timestep": t, "encoder_hidden_states": n(b, 5, 12),
                         "attention_kwargs": None},
        times=FRACTIONS,
    ),
    "CogView3PlusTransformer2DModel": Denoiser(
        {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8,
         "sample_size": 8},
        lambda n, b, t: {"hidden_states": n(b, 4, 8, 8), "encoder_hidden_states": n(b, 5, 12),
            "timestep": t, **_sizes(b)},
    ),
    "CogView4Transformer2DModel": Denoiser(
        {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 8},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "encoder_hidden_states": n(b, 5, 12), "timestep": t, **_sizes(b),
            "attention_kwargs": None},
    ),
    "GlmImageTransformer2DModel": Denoiser(
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4,
         "prior_vq_quantizer_codebook_size": 64},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "encoder_hidden_states": n(b, 5, 12), "prior_token_id": n.ids(64, b, 16),
            "prior_token_drop": torch.zeros(b, 16, dtype=torch.bool), "timestep": t,
            "target_size": torch.tensor([[64.0, 64]] * b), "crop_coords": torch.zeros(b, 2), "attention_kwargs": None,
            "kv_caches": None},
    ),
    "HiDreamImageTransformer2DModel": Denoiser(
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [8, 4], "text_emb_dim": 8,
         "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32),
         "llama_layers": (0, 1), "force_inference_output": True},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "timesteps": t, "encoder_hidden_states_t5": n(b, 8, 8),
            "encoder_hidden_states_llama3": n(2, b, 8, 4), "pooled_embeds": n(b, 8)},
    ),
    "HunyuanImageTransformer2DModel": Denoiser(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "guidance_embeds": True,
         "text_embed_dim": 12,
         "text_embed_2_dim": 10, "rope_axes_dim": (4, 4)},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 6, 6), "timestep": t.float(), "timestep_r": None,
            "guidance": torch.full((b,), 3500.0),
            "encoder_hidden_states": n(b, 5, 12), "encoder_attention_mask": ones(b, 5).float(),
            "encoder_hidden_states_2": n(b, 4, 10), "encoder_attention_mask_2": ones(b, 4).float(),
            "attention_kwargs": None},
    ),
    "LuminaNextDiT2DModel": Denoiser(
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
         "num_attention_heads": 3,
         "num_kv_heads": 1, "multiple_of": 16, "learn_sigma": False, "qk_norm": True, "cross_attention_dim": 12},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "encoder_hidden_states": n(b, 5, 12), "timestep": t,
            "encoder_mask": ones(b, 5).long(), "image_rotary_emb": torch.polar(torch.ones(16, 16, 4), n(16, 16, 4)),
            "cross_attention_kwargs": {"base_sequence_length": 64}},
        times=FRACTIONS,
    ),
    "Lumina2Transformer2DModel": Denoiser(
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
         "num_refiner_layers": 1,
         "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
         "axes_lens": (32, 32, 32), "cap_feat_dim": 12},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "encoder_hidden_states": n(b, 5, 12), "timestep": t,
            "encoder_attention_mask": ones(b, 5), "attention_kwargs": None},
        times=FRACTIONS,
    ),
    "SanaTransformer2DModel": Denoiser(
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
         "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "encoder_hidden_states": n(b, 5, 12),
            "encoder_attention_mask": ones(b, 5).long(), "timestep": t, "attention_kwargs": None},
    ),
    "PRXTransformer2DModel": Denoiser(
        {"in_channels": 4, "patch_size": 2, "context_in_dim": 12, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2,
         "depth": 2, "axes_dim": [4, 4]},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "encoder_hidden_states": n(b, 5, 12), "timestep": t,
            "attention_mask": ones(b, 5)},
        times=FRACTIONS,
    ),
    "OmniGenTransformer2DModel": Denoiser(
        {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32,
         "num_layers": 2,
         "pad_token_id": 0, "vocab_size": 100, "in_channels": 4, "time_step_dim": 4, "pos_embed_max_size": 16,
         "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "timestep": t, "input_ids": n.ids(10, b, 20),
            "input_img_latents": [], "input_image_sizes": {},
            "attention_mask": torch.ones(b, 37, 37), "position_ids": torch.arange(37).repeat(b, 1)},
        times=FRACTIONS,
    ),
    "ErnieImageTransformer2DModel": Denoiser(
        {"hidden_size": 16, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 16, "in_channels": 4,
         "out_channels": 4, "patch_size": 1, "text_in_dim": 12, "rope_axes_dim": (8, 4, 4)},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 4, 4), "timestep": t, "text_bth": n(b, 5, 12),
            "text_lens": torch.arange(b) % 2 + 4},
    ),
    "BriaFibo2Transformer2DModel": Denoiser(
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 12,
         "injection_layer_ids": (0, 1), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
         "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 6, 6),
         "axes_lens": (64, 16, 16)},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 8, 8), "timestep": t, "encoder_hidden_states": n(b, 3, 8, 12),
            "encoder_attention_mask": ones(b, 8), "context_latents": None},
        times=FRACTIONS,
    ),
    "ZImageTransformer2DModel": Denoiser(
        {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 16, "n_layers": 1,
         "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 12, "axes_dims": [8, 4, 4],
         "axes_lens": [256, 32, 32]},
        lambda n, b, t: {"x": [n(4, 1, 8, 8) for _ in range(b)], "t": t,
            "cap_feats": [n(5 + i % 2, 12) for i in range(b)]},
        times=FRACTIONS,
    ),
    "PriorTransformer": Denoiser(
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 12, "num_embeddings": 7,
         "additional_embeddings": 4},
        lambda n, b, t: {
            "hidden_states": n(b, 12), "timestep": t[0], "proj_embedding": n(b, 12),
            "encoder_hidden_states": n(b, 7, 12),
            "attention_mask": ones(b, 7)},
    ),
    "DreamLiteTransformer2DModel": Denoiser(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "num_layers": 1,
         "cross_attention_dim": 12,
         "norm_num_groups": 8, "use_linear_projection": True},
        lambda n, b, t: {
            "hidden_states": n(b, 16, 4, 4), "encoder_hidden_states": n(b, 5, 12), "cross_attention_kwargs": None},
        times=None,
    ),
    "TransformerTemporalModel": Denoiser(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "num_layers": 1, "norm_num_groups": 8},
        lambda n, b, t: {"hidden_states": n(b * 2, 16, 4, 4), "num_frames": 2}, times=None,
    ),
    "JoyImageEditTransformer3DModel": Denoiser(
        {"patch_size": [1, 2, 2], "in_channels": 4, "out_channels": 4, "hidden_size": 32, "num_attention_heads": 2,
         "text_dim": 12, "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256},
        lambda n, b, t: {"hidden_states": n(b, 4, 1, 4, 4), "timestep": t, "encoder_hidden_states": n(b, 5, 12)},
    ),
    "JoyImageEditPlusTransformer3DModel": Denoiser(
        {"patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 12,
         "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256},
        lambda n, b, t: {
            "hidden_states": n(b, 2, 4, 1, 2, 2), "timestep": t, "encoder_hidden_states": n(b, 5, 12),
            "encoder_hidden_states_mask": ones(b, 5), "shape_list": [[(1, 1, 1), (1, 1, 1)]] * b},
    ),
}
