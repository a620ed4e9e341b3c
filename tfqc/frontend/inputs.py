"""Inputs of a model: their names and places in a call, their roles, their symbolic dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.graph import _Namespace
from torch.utils import _pytree as pytree

from tfqc.errors import CaptureError
from tfqc.ir.program import Constant, Input, Role
from tfqc.ir.types import TensorType

# What diffusers calls the inputs of its denoisers. Anything else that is a tensor is constant over one image.
SAMPLE_NAMES = {"sample", "hidden_states", "x", "latents", "noisy_latents", "x_t"}
TIME_NAMES = {"timestep", "timesteps", "t", "time", "time_step", "sigma"}

_UNKNOWN = TensorType(torch.float32, ())  # until torch.export has told

Example = Mapping[str, Any] | Sequence[Any]
DynamicDims = Mapping[str, Mapping[int, str]]


def parameters_of(model: torch.nn.Module) -> dict[str, inspect.Parameter]:
    """The model's arguments by name, in the order of `forward`."""
    parameters = inspect.signature(model.forward).parameters
    return {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def arguments_by_name(model: torch.nn.Module, example: Example) -> dict[str, Any]:
    """Example arguments in the order of `forward`; None where that is the default is no argument."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = list(known := parameters_of(model))
    if not isinstance(example, Mapping):
        if len(example) > len(names):
            raise CaptureError(
                f"{type(model).__name__} takes {len(names)} inputs ({', '.join(names)}), not {len(example)}: give "
                "those beyond as a mapping by name."
            )
        example = dict(zip(names, example, strict=False))
    optional = {*example} - {*names} | {k for k, p in known.items() if p.default is None}
    arguments = {str(k): v for k, v in example.items() if v is not None or k not in optional}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not open_ended and (unknown := [k for k in arguments if k not in names]):
        raise CaptureError(f"{type(model).__name__} takes no input {unknown[0]!r}; it takes {', '.join(names)}.")
    if "return_dict" in names:
        arguments["return_dict"] = False
    order = {n: i for i, n in enumerate(names)}
    return dict(sorted(arguments.items(), key=lambda item: order.get(item[0], len(order))))


def keys_of(path: Sequence[Any]) -> tuple[str, ...]:
    """A leaf's place in a call, from what pytree calls it."""
    return tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def tensors_by_path(arguments: Mapping[str, Any]) -> dict[tuple[str, ...], Tensor]:
    found: dict[tuple[str, ...], Tensor] = {}
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    for path, leaf in leaves:
        keys = keys_of(path)
        if isinstance(leaf, Tensor):
            found[keys] = leaf
        elif keys[-1] in TIME_NAMES and isinstance(leaf, (int, float)):
            found[keys] = torch.tensor(leaf)
    return found


def constants_of(model: torch.nn.Module, arguments: Mapping[str, Any]) -> dict[tuple[str, ...], Constant]:
    """What a capture fixes: leaves of the call that are no tensors, and the numbers that are defaults of the others.

    Raises:
        CaptureError: a leaf is neither a number nor a text, so that no later call could be compared with it.
    """
    found: dict[tuple[str, ...], Constant] = {}
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    for path, leaf in leaves:
        keys = keys_of(path)
        if keys == ("return_dict",) or isinstance(leaf, Tensor):
            continue
        if isinstance(leaf, (np.number, np.bool_)):
            leaf = leaf.item()
        if not isinstance(leaf, (bool, int, float, str, NoneType)):
            raise CaptureError(
                f"The input {'.'.join(keys)!r} is a {type(leaf).__name__}: only tensors, numbers, texts and None can "
                "be captured. Set it in a module of your own around the model."
            )
        found[keys] = leaf
    for name, parameter in parameters_of(model).items():
        if name != "return_dict" and name not in arguments and isinstance(parameter.default, (bool, int, float, str)):
            found[(name,)] = parameter.default
    return found


def assign_roles(flat: Mapping[tuple[str, ...], Tensor], roles: dict[str, str], domains: dict[str, int]) -> list[Input]:
    names = {".".join(path): path for path in flat}
    for given in (*roles, *domains):
        if given not in names:
            raise CaptureError(f"There is no input {given!r} to give a role; the inputs are {', '.join(names)}.")
    unknown = [r for r in roles.values() if r not in set(Role)]
    if unknown:
        raise CaptureError(f"{unknown[0]!r} is no role: use sample, time or request.")

    def role(name: str) -> Role:
        if name in roles:
            return Role(roles[name])
        last = name.rpartition(".")[2]
        if last in TIME_NAMES and "time" not in roles.values():
            return Role.TIME
        if last in SAMPLE_NAMES and "sample" not in roles.values():
            return Role.SAMPLE
        return Role.REQUEST

    names_of_nodes = _Namespace()  # keeps off the names that Python code cannot use
    inputs = [
        Input(names_of_nodes.create_name("_".join(path), None), role(n), path, _UNKNOWN, domains.get(n))
        for n, path in names.items()
    ]
    for needed, hint in ((Role.TIME, "the timestep"), (Role.SAMPLE, "the noisy sample")):
        found = [i for i in inputs if i.role is needed]
        if not found:
            raise CaptureError(
                f"No input has the role {str(needed)!r}: name {hint} with roles={{...: {str(needed)!r}}}; the inputs "
                f"are {', '.join(names)}."
            )
        if needed is Role.TIME and len(found) > 1:
            raise CaptureError(f"Only one input can be the time, not {', '.join(i.name for i in found)}.")
    return inputs


def prepare(
    arguments: dict[str, Any],
    inputs: list[Input],
    flat: Mapping[tuple[str, ...], Tensor],
    dynamic: dict[str, Mapping[int, str]],
) -> tuple[dict[str, Any], dict[tuple[str, ...], dict[int, str]]]:
    """Example arguments with a batch of at least two and one timestep an entry, and the symbols of their dimensions."""
    sample = next(flat[i.path] for i in inputs if i.role is Role.SAMPLE)
    batch = sample.shape[0]
    repeat = 2 if batch == 1 else 1
    tensors: dict[tuple[str, ...], Tensor] = {}
    dims: dict[tuple[str, ...], dict[int, str]] = {}
    for item in inputs:
        value = flat[item.path].detach()
        dims[item.path] = dict(dynamic.pop(".".join(item.path), {}))
        if item.role is Role.TIME:
            value = value.reshape(-1)[:1].expand(batch * repeat)
        if item.role is Role.TIME or (value.dim() and value.shape[0] == batch):
            # torch.export takes sizes 0 and 1 for constants.
            value = value if value.shape[0] > 1 else torch.cat([value] * repeat)
            dims[item.path][0] = "B"
        tensors[item.path] = value
    if dynamic:
        raise CaptureError(f"There is no input {next(iter(dynamic))!r} with dynamic dimensions.")

    def build(value: Any, path: tuple[str, ...]) -> Any:
        if path in tensors:
            return tensors[path]
        if isinstance(value, Mapping):
            return {k: build(v, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(build(v, (*path, str(i))) for i, v in enumerate(value))
        return value

    return {k: build(v, (k,)) for k, v in arguments.items()}, dims
