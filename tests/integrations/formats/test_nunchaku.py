"""Nunchaku Lite's W4A4: the bits are those of an unpacker that goes by the description of the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from safetensors.torch import load_file
from torch import nn

from tfqc.errors import ArtifactError, SpecError
from tfqc.integrations.formats.nunchaku import packed_linear, write_nunchaku
from tfqc.quant.step_policy import KEY, StepPolicy, policy_in


def unpacked_codes(packed: np.ndarray) -> np.ndarray:
    """One code after the other, by the place of its lane and register in a warp's tile."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    words = packed.reshape(-1).view("<u4")
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    tile, inside = row // 128, row % 128
    pack, half, lane_n = inside // 16, inside % 16 // 8, inside % 8
    block, right, lane_k, nibble = column // 64, column % 64 // 32, column % 32 // 8, column % 8
    thread = lane_n * 4 + lane_k  # of 32
    register = half * 2 + right  # of 4
    word = (((tile * (columns // 64) + block) * 8 + pack) * 32 + thread) * 4 + register
    codes = (words[word] >> (4 * nibble)).astype(np.int64) & 15
    return np.where(codes > 7, codes - 16, codes)


def unpacked_rows(packed: np.ndarray, rows: int) -> np.ndarray:
    """[O, G]"""
    count = packed.size // rows
    row, group = np.meshgrid(np.arange(rows), np.arange(count), indexing="ij")
    inside = row % 128
    place = inside // 16 * 16 + inside % 8 // 2 * 4 + inside % 16 // 8 * 2 + inside % 2
    return packed.reshape(-1)[(row // 128 * count + group) * 128 + place]


def unpacked_factor(packed: np.ndarray, down: bool) -> np.ndarray:
    """[O, r], or [r, I] where `down`."""
    wide, rank = packed.shape
    n, k = np.meshgrid(np.arange(rank if down else wide), np.arange(wide if down else rank), indexing="ij")
    outer, inner = (k // 16, n // 16) if down else (n // 16, k // 16)
    lane = n % 8 * 4 + k % 8 // 2
    place = lane * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2
    return packed.reshape(-1)[(outer * (rank // 16) + inner) * 256 + place]


def unpacked(made: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    its = {name: (t if t.dtype == torch.int8 else t.float()).numpy() for name, t in made.items()}
    rows = its["qweight"].shape[0]
    return {
        "codes": unpacked_codes(its["qweight"]),
        "scales": unpacked_rows(its["wscales"], rows),
        "up": unpacked_factor(its["proj_up"], down=False),
        "down": unpacked_factor(its["proj_down"], down=True),
        **({"bias": unpacked_rows(its["bias"], rows)[:, 0]} if "bias" in its else {}),
    }


def test_bits() -> None:
    """Unpacked, a layer is its weight: a branch of low rank, and codes within half a step of what is left."""
    torch.manual_seed(0)
    weight, bias = torch.randn(256, 384), torch.randn(256)
    made = packed_linear(weight, bias, 32, torch.bfloat16)
    shapes = {name: list(t.shape) for name, t in made.items()}
    assert shapes == {
        "qweight": [256, 192], "wscales": [6, 256], "proj_down": [384, 32], "proj_up": [256, 32],
        "smooth_factor": [384], "bias": [256],
    }  # fmt: skip
    assert {t.dtype for n, t in made.items() if n != "qweight"} == {torch.bfloat16}
    its = unpacked(made)
    assert np.array_equal(its["bias"], bias.bfloat16().float().numpy()) and bool((made["smooth_factor"] == 1).all())
    branch = its["up"] @ its["down"]
    left = weight.numpy() - branch
    exact = np.linalg.svd(weight.numpy())
    want = (exact[0][:, :32] * exact[1][:32]) @ exact[2][:32]
    assert np.abs(branch - want).max() < 0.02 * np.abs(want).max()
    scales = np.repeat(its["scales"], 64, axis=1)
    assert np.allclose(np.abs(left).reshape(256, 6, 64).max(2) / 7, its["scales"], rtol=2**-7)
    steps = left / scales
    far = np.abs(steps - np.round(steps)) < 0.499  # from the middle between two codes
    assert np.array_equal(its["codes"][far], np.clip(np.round(steps), -8, 7)[far]) and its["codes"].min() < -5
    assert np.abs(left - its["codes"] * scales).max() <= 0.51 * scales.max()
    assert "bias" not in packed_linear(weight, None, 16, torch.float16)


def dit(**more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    return DiTTransformer2DModel(**{**shape, "in_channels": 4, "num_embeds_ada_norm": 10, **more})


def test_a_folder(tmp_path: Path) -> None:
    """Its config is what diffusers reads; its tensors have the names and shapes that diffusers' layers ask for."""
    model = dit()
    targets = write_nunchaku(model, tmp_path / "out", rank=16, skip=["transformer_blocks.1.ff"])
    assert "transformer_blocks.0.attn1.to_q" in targets and "transformer_blocks.0.ff.net.2" in targets
    assert not any("norm" in name or name.startswith("transformer_blocks.1.ff") for name in targets)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel" and config["num_layers"] == 2
    its = NunchakuLiteQuantizationConfig.from_dict(config["quantization_config"])
    assert its.svdq_w4a4 == {"precision": "int4", "group_size": 64, "rank": 16, "targets": targets}
    assert its.compute_dtype == torch.bfloat16
    stored, own = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), model.state_dict()
    parts = ("qweight", "wscales", "proj_down", "proj_up", "smooth_factor", "bias")
    replaced = {f"{t}.{part}" for t in targets for part in parts}
    kept = {name for name in own if name.rpartition(".")[0] not in targets}
    assert set(stored) == replaced | kept and all(torch.equal(stored[name], own[name]) for name in kept)
    layer = {part: stored[f"{targets[0]}.{part}"] for part in parts}
    again = packed_linear(own[f"{targets[0]}.weight"], own[f"{targets[0]}.bias"], 16, torch.bfloat16)
    assert all(torch.equal(layer[part], again[part]) for part in parts)


def test_protected_steps_travel(tmp_path: Path) -> None:
    model, policy = dit(), StepPolicy(3, 2)
    model.register_to_config(quantization_config={"quant_method": "tfqc", "runtime": {KEY: policy.to_config()}})
    write_nunchaku(model, tmp_path, rank=16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert policy_in(config) == policy and config["quantization_config"]["quant_method"] == "nunchaku_lite"
    its = NunchakuLiteQuantizationConfig.from_dict(config["quantization_config"])
    assert its.svdq_w4a4["rank"] == 16


def test_what_cannot_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for rank in (20, "32", 32.0, True):
        with pytest.raises(SpecError, match=f"rank={rank!r} is no multiple of 16"):
            write_nunchaku(dit(), out, rank=rank)  # pyright: ignore[reportArgumentType]
    large = dit()
    large.transformer_blocks[1].attn1.to_q.bias.data[3] = 1e5
    with pytest.raises(SpecError, match=r"The bias of transformer_blocks\.1\.attn1\.to_q is not finite in float16"):
        write_nunchaku(large, out, rank=16, dtype="float16")
    with pytest.raises(SpecError, match="dtype='float32' is none that kernels compute in"):
        write_nunchaku(dit(), out, dtype="float32")
    with pytest.raises(SpecError, match="A Linear is no model of diffusers"):
        write_nunchaku(nn.Linear(128, 128), out)
    with pytest.raises(SpecError, match="has no layer that kernels take: linears within repeated blocks"):
        write_nunchaku(dit(attention_head_dim=16), out)
    with pytest.raises(SpecError, match="widths that 128 divides and that are at least rank=256"):
        write_nunchaku(dit(), out, rank=256)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ArtifactError, match="is there already: choose a new directory"):
        write_nunchaku(dit(), out)
