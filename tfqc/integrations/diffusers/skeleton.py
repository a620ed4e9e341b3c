"""A model of diffusers without values: what is read of a compiled model is read there, and adapters are kept there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from tfqc.integrations.diffusers.names import class_of


def skeleton_of(name: str, config: Mapping[str, Any]) -> Any:
    """A model by the name of its class in diffusers, on the meta device: who computes with it fails."""
    with torch.device("meta"):
        return class_of(name, "diffusers").from_config(dict(config))


def with_zeros(skeleton: Any) -> Any:
    """The same model; each of its weights becomes one zero on the CPU, which is read everywhere: peft puts adapters
    where the weights are that they stand beside."""
    for module in skeleton.modules():
        for own, parameter in [(k, p) for k, p in module._parameters.items() if p is not None]:
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[own] = torch.nn.Parameter(zeros, False)
    return skeleton


def copy_of(skeleton: Any) -> Any:
    """A copy with the same tensors: what is loaded into one is not in the other."""
    shared = {id(tensor): tensor for tensor in (*skeleton.parameters(), *skeleton.buffers())}
    return copy.deepcopy(skeleton, shared)
