"""Checkpoints of int8 weights as ComfyUI has them (`int8_tensorwise`), rotated or not (ConvRot, arXiv 2512.03673).

For a linear layer `L` with a weight W [O, I] the file holds

    L.weight        int8 [O, I]: codes of W R in two's complement
    L.weight_scale  f32 [O, 1]: one scale for each output; (W R)[o, i] = code * scale
    L.comfy_quant   uint8: JSON, {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}

and every other tensor as the model has it. R is block-diagonal: each group of G columns is multiplied by the regular
Hadamard matrix H of order G, a power of 4: the Kronecker power of [[1,1,1,-1], [1,1,-1,1], [1,-1,1,1], [-1,1,1,1]],
divided by sqrt(G). It is symmetric and its own inverse. Programs that multiply codes rotate activations by R, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfqc.errors import ArtifactError, SpecError
from tfqc.files.storage import parse_json, read_tensors, said, write_tensors
from tfqc.integrations.formats.linears import finite, linears_of, values_of

GROUP = 256  # which all who read such files take
_FORMAT, _MARK, _SCALE, _CENTRAL = "int8_tensorwise", "comfy_quant", "weight_scale", "_quantization_metadata"
# What a mark may say: the first three matter; of the others the values of a weight do not depend.
_KEYS = {"format", "convrot", "convrot_groupsize", "per_row", "orig_dtype", "orig_shape", "full_precision_matrix_mult"}
_PREFIX = "model.diffusion_model."


def hadamard(order: int) -> Tensor:
    """The regular Hadamard matrix [order, order] / sqrt(order), f64: symmetric and orthogonal.

    Raises:
        SpecError: the order is no power of 4.
    """
    _check_order(order)
    base, found = (
        torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0),
        torch.ones(1, 1),
    )
    while len(found) < order:
        found = torch.kron(found.double(), base)
    return found / math.sqrt(order)


def _is_order(given: Any) -> bool:
    """True for a whole number that is a power of 4, from 4 on."""
    return type(given) is int and given >= 4 and given & (given - 1) == 0 and given.bit_length() % 2 == 1


def _check_order(given: Any) -> None:
    if not _is_order(given):
        raise SpecError(f"group={given!r} is no power of 4 from 4 on: {GROUP} is usual.")


def rotated(weight: Tensor, group: int) -> Tensor:
    """W R of a weight [O, I], in f32; twice gives the weight back."""
    blocks = weight.reshape(len(weight), weight.shape[1] // group, group)
    return (blocks @ hadamard(group).to(weight.dtype)).reshape(weight.shape)


def write_convrot(model: nn.Module, path: str | Path, *, group: int = GROUP, skip: Sequence[str] = ()) -> list[str]:
    """Write a model's weights with its linear layers in int8, by their own ranges; no data is needed.

    Args:
        path: of the safetensors file.
        group: columns that are rotated together, a power of 4. Layers whose width it does not divide stay as they are.
        skip: names of modules, or parts of them between dots, that stay as they are.

    Returns:
        The names of the layers that are int8.

    Raises:
        SpecError: no layer can be written so, or a weight is not finite.
        ArtifactError: the file cannot be written.
    """
    _check_order(group)
    tensors = dict(values_of(model))
    fitting = [name for name, layer in linears_of(model, skip).items() if layer.in_features % group == 0]
    if not fitting:
        raise SpecError(
            f"No linear layer of {type(model).__name__} has a width that {group} divides"
            f"{' outside of what is skipped' if skip else ''}: take a smaller power of 4 for group."
        )
    mark = json.dumps({"format": _FORMAT, "convrot": True, "convrot_groupsize": group}).encode()
    for name in fitting:
        turned = rotated(finite(name, tensors[f"{name}.weight"]), group)
        scale = (turned.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        tensors[f"{name}.weight"] = (turned / scale).round().clamp(-127, 127).to(torch.int8)
        tensors[f"{name}.{_SCALE}"] = scale
        tensors[f"{name}.{_MARK}"] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
    try:
        write_tensors(Path(path), tensors)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {said(error)}.") from error
    return fitting


def read_convrot(path: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights that such a file stands for, by the names of the model: for `model.load_state_dict`.

    Args:
        dtype: of the weights that were int8; others stay as they are.

    Raises:
        ArtifactError: the file cannot be read, holds weights in another format, or a part of one is not there.
        SpecError: weights have no such dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"dtype={dtype!r} is none of floating point, such as torch.bfloat16.")
    path = Path(path)
    stored, metadata = read_tensors(path, ArtifactError)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        twice = next(name for name in stored if f"{_PREFIX}{name}" in stored)
        raise ArtifactError(f"{path} holds both {twice} and {_PREFIX}{twice}, which are one name.")
    central, marks = _central(metadata, path), _beside(tensors, path)
    if differ := [layer for layer in central if marks.setdefault(layer, central[layer]) != central[layer]]:
        raise ArtifactError(f"{path} says of {differ[0]} one format in {_CENTRAL}, and another in {differ[0]}.{_MARK}.")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        if last in (_MARK, _SCALE, "input_scale"):
            if layer not in marks:
                raise ArtifactError(f"{path} holds {name} and does not say in which format the weight is.")
        elif last == "weight" and layer in marks:
            found[name] = _values(tensor, tensors.get(f"{layer}.{_SCALE}"), marks[layer], f"{path}: {name}").to(dtype)
        elif tensor.dtype == torch.int8:
            raise ArtifactError(
                f"{path} holds {name} in int8 and does not say in which format: no {_MARK} is beside it."
            )
        else:
            found[name] = tensor
    if lacking := [layer for layer in marks if f"{layer}.weight" not in tensors]:
        raise ArtifactError(f"{path} has no {lacking[0]}.weight, which it says to be int8: the file is not whole.")
    return found


def _beside(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        if last == _MARK:
            if tensor.dtype != torch.uint8 or tensor.dim() != 1:
                raise ArtifactError(f"{path}: {name} is {_kind(tensor)}, and the text of a mark is torch.uint8 [N].")
            text = bytes(tensor.tolist()).decode("utf-8", "replace")
            found[layer] = _checked(parse_json(text, f"{path}: {name}", ArtifactError), f"{path}: {name}")
    return found


def _central(metadata: Mapping[str, str], path: Path) -> dict[str, Mapping[str, Any]]:
    """Marks of all layers in the file's metadata, where some tools write them."""
    if _CENTRAL not in metadata:
        return {}
    what = f"{path}: {_CENTRAL}"
    layers = parse_json(metadata[_CENTRAL], what, ArtifactError)
    layers = layers.get("layers") if isinstance(layers, dict) else None  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(layers, dict):
        raise ArtifactError(f"{what} has no layers.")
    return {str(n).removeprefix(_PREFIX): _checked(mark, f"{what}, {n}") for n, mark in layers.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _checked(mark: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(mark, dict) or mark.get("format") != _FORMAT:
        raise ArtifactError(f"{where} says {str(mark)[:80]}: {_FORMAT} is what is read here.")
    if strange := set(mark) - _KEYS:  # pyright: ignore[reportUnknownArgumentType]
        raise ArtifactError(f"{where} says {min(map(str, strange))!r}, which tfqc does not know.")
    if not isinstance(mark.get("convrot", False), bool):
        raise ArtifactError(f"{where} says convrot={mark['convrot']!r}: true or false.")
    return mark  # pyright: ignore[reportUnknownVariableType]


def _values(codes: Tensor, scale: Tensor | None, mark: Mapping[str, Any], where: str) -> Tensor:
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ArtifactError(f"{where} is {_kind(codes)}, and what is marked {_FORMAT} is torch.int8 [O, I].")
    if "orig_shape" in mark and mark["orig_shape"] != list(codes.shape):
        raise ArtifactError(f"{where} is {_kind(codes)}, and its mark says {str(mark['orig_shape'])[:80]}.")
    if scale is None or not scale.is_floating_point():
        raise ArtifactError(f"{where} has for {_SCALE} {'nothing' if scale is None else _kind(scale)}: f32 is usual.")
    scale = scale.float()
    if scale.numel() != 1 and tuple(scale.shape) not in ((len(codes),), (len(codes), 1)):
        raise ArtifactError(f"{where} has scales {list(scale.shape)}: one, or one for each of {len(codes)} outputs.")
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ArtifactError(f"{where} has a scale that is no positive number: the file is damaged.")
    weight = codes.float() * scale.reshape(-1, 1)
    if not mark.get("convrot", False):
        return weight
    group = mark.get("convrot_groupsize", GROUP)
    if not _is_order(group) or codes.shape[1] % group:
        raise ArtifactError(f"{where} is rotated in groups of {group!r}: a power of 4 that divides {codes.shape[1]}.")
    return rotated(weight, group) if weight.numel() else weight


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
