"""Which layers of a model are written in another format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tfqc.errors import SpecError


def linears_of(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Linear]:
    """A model's linear layers by name, without those within modules that `skip` or the model itself keeps as they are,
    and without those that have no value or no name: a model that is a layer has one with no name.

    Args:
        skip: names of modules, or parts of them between dots.

    Raises:
        SpecError: it is no list of names, or a part of it names nothing.
    """
    modules = dict(model.named_modules())
    found = {n: layer for n, layer in modules.items() if n and type(layer) is nn.Linear and layer.weight.numel()}
    if isinstance(skip, str) or not isinstance(skip, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"skip={skip!r} is no list of names of modules, such as ['proj_out'].")
    for part in skip:
        if not part or not any(within(name, part) for name in modules):
            raise SpecError(f"skip={part} names no module of {type(model).__name__}.")
    kept = [*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return {name: layer for name, layer in found.items() if not any(within(name, part) for part in kept)}


def within(name: str, part: str) -> bool:
    """True for a module's name that holds another's, or a part of it between dots."""
    return f".{part}." in f".{name}."


def values_of(model: nn.Module) -> Mapping[str, Tensor]:
    """A model's tensors by name.

    Raises:
        SpecError: it is no model, has no weights, or they are not all of it: quantized, or with adapters beside them.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"A {kind} is no model: give a torch.nn.Module, of a pipeline its denoiser.")
    found: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in found.items():
        if tensor.is_meta:
            raise SpecError(f"{kind} has no weights (it lies on the meta device): load them first.")
        if tensor.dtype in (torch.int8, torch.uint8):
            raise SpecError(
                f"{name} of {kind} is {tensor.dtype}: the model is quantized already; take the one that it was made "
                "from, or model.dequantize()."
            )
        if ".base_layer." in name:
            raise SpecError(f"{kind} has an adapter beside {name}: fuse it first (fuse_lora(), unload_lora_weights()).")
    return found


def finite(name: str, weight: Tensor) -> Tensor:
    """A weight in f32.

    Raises:
        SpecError: it holds NaN or infinity.
    """
    value = weight.float()  # of 8-bit floats nothing is asked
    if not bool(torch.isfinite(value).all()):
        raise SpecError(f"The weight of {name} holds NaN or infinity, which has no code.")
    return value
