"""Tensors as files want them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as safetensors wants them; copied only where they do."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found
