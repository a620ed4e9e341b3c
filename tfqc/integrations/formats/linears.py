"""Which layers of a model are written in another format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tfqc.errors import SpecError


def linears_of(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Linear]:
    """A model's linear layers by name, without those within modules that `skip` or the model itself keeps as they are.

    Args:
        skip: names of modules, or parts of them between dots.

    Raises:
        SpecError: a part of `skip` names nothing.
    """
    found = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    for part in skip:
        if not any(within(name, part) for name, _ in model.named_modules()):
            raise SpecError(f"skip={part} names no module of {type(model).__name__}.")
    kept = [*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return {name: layer for name, layer in found.items() if not any(within(name, part) for part in kept)}


def within(name: str, part: str) -> bool:
    """True for a module's name that holds another's, or a part of it between dots."""
    return f".{part}." in f".{name}."


def values_of(model: nn.Module) -> Mapping[str, Tensor]:
    """A model's tensors by name.

    Raises:
        SpecError: it has no weights.
    """
    found: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.is_meta for tensor in found.values()):
        raise SpecError(f"{type(model).__name__} has no weights (it lies on the meta device): load them first.")
    return found


def finite(name: str, weight: Tensor) -> Tensor:
    """A weight in f32.

    Raises:
        SpecError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SpecError(f"The weight of {name} holds NaN or infinity, which has no code.")
    return weight.float()
