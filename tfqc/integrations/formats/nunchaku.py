"""Folders of diffusers with 4-bit layers as Nunchaku Lite has them (`NunchakuLiteQuantizationConfig`, W4A4).

A linear layer with a weight W [O, I] becomes a branch of low rank and codes of what is left: W = U D + code * scale.

    L.qweight        int8 [O, I/2]: codes, -8..7, two in a byte
    L.wscales        [I/64, O]: a scale for 64 columns of a row
    L.proj_down      [I, r], L.proj_up [O, r]: D and U
    L.smooth_factor  [I]: what inputs are divided by; ones
    L.bias           [O]

all but codes in the compute dtype, laid out for kernels (`tfqc.integrations.formats.nunchaku_layout`). Inputs are
quantized by the kernels: no data is needed here, and neither is a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfqc.errors import ArtifactError, SpecError
from tfqc.files.storage import said, write_tensors, write_text
from tfqc.integrations.formats.linears import finite, linears_of, values_of
from tfqc.integrations.formats.nunchaku_layout import TILE, packed_codes, packed_low_rank, packed_rows
from tfqc.quant.step_policy import KEY, policy_in

GROUP, DTYPES = 64, ("bfloat16", "float16")
# What modulates by time has a row for each image, which products of 4 bits are slow at: tools tell it by its name.
_LEFT = ("norm", "modulation")


def write_nunchaku(
    model: Any, directory: str | Path, *, rank: int = 32, dtype: str = "bfloat16", skip: Sequence[str] = ()
) -> list[str]:
    """Write a model of diffusers as a folder whose repeated layers have 4 bits.

    Layers are those within a list of two or more blocks of one class, of widths that 128 divides, and not named after
    norms or modulation, as other tools choose them.

    Args:
        directory: new, or empty.
        rank: of the branch, a multiple of 16.
        dtype: that the model computes in.
        skip: names of modules, or parts of them between dots, that stay as they are.

    A step policy in the model's config goes into the folder's.

    Returns:
        The names of the layers that have 4 bits.

    Raises:
        SpecError: the model is none of diffusers, no layer can be written so, a value is not finite, or its config has
            a step policy that is none.
        ArtifactError: the folder cannot be written, or holds something.
    """
    own: Any = model
    if not isinstance(model, nn.Module) or not hasattr(own, "to_json_string"):
        raise SpecError(f"A {type(model).__name__} is no model of diffusers, whose config.json such a folder has.")
    if type(rank) is not int or rank < 16 or rank % 16:
        raise SpecError(f"rank={rank!r} is no multiple of 16 from 16 on.")
    if dtype not in DTYPES:
        raise SpecError(f"dtype={dtype!r} is none that kernels compute in: {' or '.join(DTYPES)}.")
    tensors, targets = dict(values_of(model)), _targets(model, rank, skip)
    if not targets:
        raise SpecError(
            f"{type(model).__name__} has no layer that kernels take: linears within repeated blocks, of widths that "
            f"{TILE} divides and that are at least rank={rank}{', outside of what is skipped' if skip else ''}."
        )
    folder = Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} is there already: choose a new directory.")
    for name in targets:
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        made = packed_linear(finite(name, weight), bias, rank, getattr(torch, dtype))
        if over := [part for part, value in made.items() if not bool(torch.isfinite(value).all())]:
            raise SpecError(f"The {over[0]} of {name} is not finite in {dtype}.")
        tensors |= {f"{name}.{part}": value for part, value in made.items()}
    scheme = {"precision": "int4", "group_size": GROUP, "rank": rank, "targets": targets}
    quantization: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": dtype, "svdq_w4a4": scheme}
    config = json.loads(own.to_json_string())
    policy = policy_in(config)
    if policy is not None:
        quantization["runtime"] = {KEY: policy.to_config()}
    config["quantization_config"] = quantization
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {said(error)}.") from error
    return targets


def packed_linear(weight: Tensor, bias: Tensor | None, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer by their last names.

    The branch is the truncated SVD (SVDQuant, arXiv 2411.05007), rounded to `dtype` before the rest is quantized; a
    scale is the largest value of its group / 7.

    Args:
        weight: [O, I] f32, both multiples of 128. bias: [O].
    """
    up, values, down = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = (up[:, :rank] * root).to(dtype), (root[:, None] * down[:rank]).to(dtype)
    rest = (weight - up.float() @ down.float()).reshape(len(weight), -1, GROUP)
    scale = (rest.abs().amax(2) / 7).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    codes = (rest / scale.float()[:, :, None]).round().clamp(-8, 7).reshape(weight.shape)
    made = {
        "qweight": packed_codes(codes),
        "wscales": packed_rows(scale),
        "proj_down": packed_low_rank(down, down=True),
        "proj_up": packed_low_rank(up, down=False),
        "smooth_factor": torch.ones(weight.shape[1], dtype=dtype),
    }
    return made if bias is None else {**made, "bias": packed_rows(bias.to(dtype)[:, None]).flatten()}


def _targets(model: nn.Module, rank: int, skip: Sequence[str]) -> list[str]:
    stacks = [
        name
        for name, found in model.named_modules()
        if isinstance(found, nn.ModuleList) and len(found) > 1 and len({type(block) for block in found}) == 1
    ]
    return [
        name
        for name, layer in linears_of(model, skip).items()
        if any(name.startswith(f"{stack}.") for stack in stacks)
        and not any(part in name for part in _LEFT)
        and layer.in_features % TILE == layer.out_features % TILE == 0
        and rank <= min(layer.in_features, layer.out_features)
    ]
