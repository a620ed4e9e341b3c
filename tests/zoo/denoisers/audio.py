"""Transformers over audio."""

from __future__ import annotations

import torch

from tests.zoo.denoisers.entry import FRACTIONS, Denoiser, ones

# fmt: off
DENOISERS = {
    "AceStepTransformer1DModel": Denoiser(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "patch_size": 2,
         "sliding_window": 4},
        lambda n, b, t: {
            "hidden_states": n(b, 16, 8), "timestep": t, "timestep_r": t, "encoder_hidden_states": n(b, 5, 32),
            "context_latents": n(b, 16, 16)},
        times=FRACTIONS, roles={"timestep": "time", "timestep_r": "time"},
    ),
    "StableAudioDiTModel": Denoiser(
        {"sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
         "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 12, "time_proj_dim": 8,
         "global_states_input_dim": 10, "cross_attention_input_dim": 12},
        lambda n, b, t: {
            "hidden_states": n(b, 4, 16), "timestep": t[:1], "encoder_hidden_states": n(b, 5, 12),
            "global_hidden_states": n(b, 1, 10), "rotary_embedding": (n(17, 4).cos(), n(17, 4).sin())},
        times=FRACTIONS,
    ),
    "StableAudio3DiTModel": Denoiser(
        {"io_channels": 8, "patch_size": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 16,
         "global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2,
         "num_memory_tokens": 3, "use_differential_attention": True},
        lambda n, b, t: {
            "hidden_states": n(b, 8, 16), "timestep": t, "encoder_hidden_states": n(b, 4, 16),
            "global_hidden_states": n(b, 12), "encoder_attention_mask": ones(b, 4), "local_add_cond": n(b, 5, 16)},
        times=FRACTIONS,
    ),
    "LongCatAudioDiTTransformer": Denoiser(
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": True},
        lambda n, b, t: {
            "hidden_states": n(b, 16, 8), "encoder_hidden_states": n(b, 10, 32), "encoder_attention_mask": ones(b, 10),
            "timestep": t, "attention_mask": torch.ones(b, 16, dtype=torch.bool), "latent_cond": n(b, 16, 8)},
        times=FRACTIONS,
    ),
    "MiniMaxMusic3Transformer1DModel": Denoiser(
        {"in_channels": 8, "condition_dim": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
         "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8},
        lambda n, b, t: {"hidden_states": n(b, 8, 24), "encoder_hidden_states": n(b, 24, 16), "timestep": t},
        times=FRACTIONS,
    ),
    "T5FilmDecoder": Denoiser(
        {"input_dims": 6, "targets_length": 8, "max_decoder_noise_time": 20.0, "d_model": 16, "num_layers": 2,
         "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda n, b, t: {
            "encodings_and_masks": [(n(b, 5, 16), ones(b, 5)), (n(b, 3, 16), ones(b, 3))],
            "decoder_input_tokens": n(b, 8, 6), "decoder_noise_time": t},
        times=FRACTIONS, roles={"decoder_input_tokens": "sample", "decoder_noise_time": "time"},
    ),
}
