"""Parts of pipelines with random weights, small enough to run in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

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


def image_encoder() -> Any:
    config = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=4, image_size=16,
        intermediate_size=WIDTH, patch_size=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def unet(**more: Any) -> Any:
    return UNet2DConditionModel(
        **{
            "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 32), "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8, **more,
        }
    ).eval()  # fmt: skip


def t5() -> Any:
    config = UMT5Config(vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=4)
    return UMT5EncoderModel(config).eval()


def chat_tokenizer() -> Any:
    """Qwen's, with bytes for words: the longer a prompt, the more tokens."""
    vocab = {word: number for number, word in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    chat = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    return Qwen2Tokenizer(vocab, [], chat_template=chat)


def chat_model() -> Any:
    config = Qwen3Config(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen3Model(config).eval()


def video_vae() -> Any:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def video_transformer() -> Any:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def picture(channels: int = 3) -> torch.Tensor:
    """[1, channels, 16, 16], 0 to 1."""
    return torch.rand(1, channels, 16, 16, generator=torch.Generator().manual_seed(3))


def embedded(*names: str, masks: tuple[str, ...] = (), length: int = 6) -> dict[str, Any]:
    """Text that is embedded already, under the pipeline's names for it."""
    torch.manual_seed(5)
    shapes = {name: (1, WIDTH) if "pooled" in name else (1, length, WIDTH) for name in names}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {m: torch.ones(1, length) for m in masks}
