"""Molecules, and models of everything at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.denoisers.entry import FRACTIONS, Denoiser, Draw

# fmt: off


def _protein(n: Draw, b: int, t: Tensor) -> dict[str, Any]:
    mask = torch.ones(b, 6, dtype=torch.bool)
    return {
        "bb_ca": n(b, 6, 3), "local_latents": n(b, 6, 8), "bb_ca_time": t, "local_latents_time": t,
        "padding_mask": mask, "token_type": n.ids(4, b, 6),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(b, 6, dtype=torch.bool), "supports_local_latent": mask},
        "recycle_depth": 1}


def _omni(n: Draw, b: int, t: Tensor) -> dict[str, Any]:
    """One packed sequence, as the pipeline has it: two of text, four of a 2 x 2 image."""
    vision = torch.arange(2, 6)
    return {
        "input_ids": torch.tensor([1, 2]), "text_indexes": torch.tensor([0, 1]),
        "position_ids": torch.zeros(3, 6).long(), "und_len": 2, "sequence_length": 6,
        "vision_tokens": [n(1, 2, 1, 2, 2)], "vision_token_shapes": [(1, 2, 2)], "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision, "vision_timesteps": t[:1].expand(4),
        "vision_noisy_frame_indexes": [torch.tensor([0])]}


DENOISERS = {
    "RFD4ProteinaTransformer": Denoiser(
        {"nlayers": 2, "token_dim": 16, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 8,
         "token_type_emb_dim": 4, "cath_emb_dim": 4, "t_emb_dim": 8, "seq_sep_dim": 8, "xt_pair_dist_dim": 6,
         "tri_mult_c": 8, "num_sequence_classes": 10, "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
         "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"), "feats_pair_repr": ("xt_bb_ca_pair_dists",)},
        _protein, times=FRACTIONS,
        roles={"bb_ca": "sample", "local_latents": "sample", "bb_ca_time": "time", "local_latents_time": "time"},
        draws=64,
    ),
    "Cosmos3OmniTransformer": Denoiser(
        {"head_dim": 6, "hidden_act": "relu2", "hidden_size": 12, "intermediate_size": 24, "latent_channel": 2,
         "latent_patch_size": 1, "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
         "patch_latent_dim": 2, "qk_norm_for_text": False, "rms_norm_eps": 1e-5, "rope_axes_dim": [1, 1, 1],
         "rope_theta": 1e8, "vocab_size": 32},
        _omni, roles={"vision_tokens.0": "sample", "vision_timesteps": "time"},
    ),
}
