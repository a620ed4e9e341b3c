"""Inputs of a model: their names and places in a call, their roles, their symbolic dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfqc.errors import CaptureError
from tfqc.frontend.names import input_names
from tfqc.ir.program import Constant, Input, Role
from tfqc.ir.types import TensorType

# What diffusers calls the inputs of its denoisers. Anything else that is a tensor is constant over one image.
SAMPLE_NAMES = {"sample", "hidden_states", "x", "latents", "noisy_latents", "x_t"}
TIME_NAMES = {"timestep", "timesteps", "t", "time", "time_step", "sigma", "timestep_ratio"}

_UNKNOWN = TensorType(torch.float32, ())  # until torch.export has told

Example = Mapping[str, Any] | Sequence[Any]
Roles = Mapping[Any, str] | Sequence[str | None] | Callable[[str, Tensor], str | None]


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
    if unknown := [k for k in arguments if k not in names]:
        rest = next((f"**{p.name}" for p in parameters if p.kind is p.VAR_KEYWORD), "")
        how = (
            f" but in {rest}, which torch.export does not read: write a module around it that names it" if rest else ""
        )
        raise CaptureError(f"{type(model).__name__} takes no input {unknown[0]!r}{how}; it takes {', '.join(names)}.")
    if "return_dict" in names:
        arguments["return_dict"] = False
    order = {n: i for i, n in enumerate(names)}
    return dict(sorted(arguments.items(), key=lambda item: order.get(item[0], len(order))))


def keys_of(path: Sequence[Any]) -> tuple[str, ...]:
    """A leaf's place in a call, from what pytree calls it."""
    return tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def roles_by_name(model: torch.nn.Module, example: Example, given: Roles | None) -> dict[str, str]:
    """Dotted name of an input -> role.

    Args:
        given: a mapping by (dotted) name or by position among the arguments of `forward`; roles of the first arguments
            in order; or a function of an input's name and example; None where the usual names are to tell.

    Raises:
        CaptureError: a position beyond the arguments.
    """
    if given is None:
        return {}
    arguments = arguments_by_name(model, example)
    if callable(given):
        leaves = [(".".join(keys_of(path)), leaf) for path, leaf in pytree.tree_flatten_with_path(arguments)[0]]
        told = {name: given(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)}
        return {name: role for name, role in told.items() if role is not None}
    names = [name for name in arguments if name != "return_dict"]
    found: dict[str, str] = {}
    for key, role in given.items() if isinstance(given, Mapping) else enumerate(given):
        if isinstance(key, int) and not 0 <= key < len(names):
            raise CaptureError(f"There is no input number {key} to give a role; the inputs are {', '.join(names)}.")
        if role is not None:
            found[names[key] if isinstance(key, int) else key] = role
    return found


def tensors_by_path(
    arguments: Mapping[str, Any], roles: Mapping[str, str] | None = None
) -> dict[tuple[str, ...], Tensor]:
    """Tensors of a call, and a timestep that is a Python number as one."""
    leaves = {keys_of(path): leaf for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]}
    numbers = {p for p, leaf in leaves.items() if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)}
    tensors = {p for p, leaf in leaves.items() if isinstance(leaf, Tensor)}
    times = in_role(Role.TIME, tensors | numbers, roles or {})
    return {p: torch.as_tensor(leaf) for p, leaf in leaves.items() if p in tensors or (p in numbers and p in times)}


_EMPTY = inspect.Parameter.empty
_USUAL = {Role.SAMPLE: SAMPLE_NAMES, Role.TIME: TIME_NAMES}


def in_role(role: Role, paths: Collection[tuple[str, ...]], roles: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Places that have a role: as the caller says, else by the usual names, those that are nested least."""
    if role in roles.values():
        return {path for path in paths if roles.get(".".join(path)) == role}
    named = {path: [key for key in path if not key.isdigit()] for path in paths}  # without places in lists
    usual = [p for p, keys in named.items() if keys[-1:] and keys[-1] in _USUAL[role] and ".".join(p) not in roles]
    return {path for path in usual if len(named[path]) == min(len(named[p]) for p in usual)}


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


def off_default(model: torch.nn.Module, constants: Mapping[tuple[str, ...], Constant]) -> dict[str, Constant]:
    """Arguments that a capture fixed at another value than the model itself has where a call leaves them out."""
    defaults = {name: parameter.default for name, parameter in parameters_of(model).items()}
    own = {path[0]: value for path, value in constants.items() if len(path) == 1 and value is not None}
    return {k: v for k, v in own.items() if defaults.get(k, _EMPTY) is not _EMPTY and defaults[k] != v}


def for_each_image(constants: Mapping[tuple[str, ...], Constant], images: int) -> dict[tuple[str, ...], Constant]:
    """Constants of a list that says the same of every image, once: `img_shapes.0.1`, `img_shapes.1.1` are
    `img_shapes.*.1`, for any number of images."""
    found = dict(constants)
    for argument in {path[0] for path in constants}:
        own = {path: value for path, value in constants.items() if path[0] == argument}
        entries: dict[str, dict[tuple[str, ...], Constant]] = {}
        for path, value in own.items():
            entries.setdefault(path[1] if len(path) > 1 else "", {})[path[2:]] = value
        first = entries.get("0")
        listed = [*entries] == [str(i) for i in range(images)] and all(own_ == first for own_ in entries.values())
        if first and listed and (images > 1 or () not in first):
            found = {path: value for path, value in found.items() if path[0] != argument}
            found |= {(argument, "*", *rest): value for rest, value in first.items()}
    return found


def assign_roles(
    flat: Mapping[tuple[str, ...], Tensor], roles: Mapping[str, str], domains: Mapping[str, int]
) -> list[Input]:
    """One Input for each tensor of a call: the one list that says which is the sample and which the time.

    A time that is no number for each image (of tokens or frames, embedded already), and any time beside the first, is
    what samples are: it differs from step to step, and stands behind them.
    """
    names = {".".join(path): path for path in flat}
    if len(names) < len(flat):
        twice = next(".".join(path) for path in flat if names[".".join(path)] != path)
        raise CaptureError(f"Two inputs are called {twice!r}: keys with a dot cannot be told from nested ones.")
    for given in (*roles, *domains):
        if given not in names:
            raise CaptureError(f"There is no input {given!r} to give a role; the inputs are {', '.join(names)}.")
    unknown = [r for r in roles.values() if r not in set(Role)]
    if unknown:
        raise CaptureError(f"{unknown[0]!r} is no role: use sample, time or request.")

    role_of = dict.fromkeys(flat, Role.REQUEST)
    for role in (Role.SAMPLE, Role.TIME):
        role_of |= dict.fromkeys(in_role(role, flat, roles), role)
    images = _images(flat, [path for path, role in role_of.items() if role is Role.SAMPLE])
    times = [path for path, role in role_of.items() if role is Role.TIME]
    clock = next((path for path in times if _is_time(flat[path], images)), None)
    role_of |= {path: Role.SAMPLE for path in times if path != clock}
    ordered = sorted(names.values(), key=lambda path: path in times and path != clock)  # the sample comes first
    words = input_names(flat)
    inputs = [Input(words[path], role_of[path], path, _UNKNOWN, domains.get(".".join(path))) for path in ordered]
    if not any(i.role is Role.SAMPLE and i.path not in times for i in inputs):
        raise CaptureError(
            "No input has the role 'sample': name the noisy sample with roles={...: 'sample'}; the inputs are "
            f"{', '.join(names)}."
        )
    unsaid = [n for n, path in names.items() if role_of[path] is Role.REQUEST and n not in roles]
    if not times and (like := [n for n in unsaid if _is_time(flat[names[n]], images)]):
        raise CaptureError(
            f"No input has the role 'time', and {like[0]} may be it: name the timestep with roles={{...: 'time'}}; if "
            f"the model is told none, say roles={{{', '.join(f'{n!r}: {str(Role.REQUEST)!r}' for n in like)}}}."
        )
    return inputs


def _images(flat: Mapping[tuple[str, ...], Tensor], samples: Sequence[tuple[str, ...]]) -> int:
    return flat[samples[0]].shape[0] if samples and flat[samples[0]].dim() else 1


def images_of(inputs: Sequence[Input], flat: Mapping[tuple[str, ...], Tensor]) -> int:
    """How many images an example has."""
    return _images(flat, [i.path for i in inputs if i.role is Role.SAMPLE])


def _is_time(value: Tensor, images: int) -> bool:
    """Whether a tensor is one number for each image, or for all: what a table can have rows for."""
    each = value.dim() > 0 and value.shape[0] == images and value.numel() == images
    return value.dtype != torch.bool and not value.is_complex() and (value.numel() == 1 or each)


def prepare(
    arguments: dict[str, Any],
    inputs: list[Input],
    flat: Mapping[tuple[str, ...], Tensor],
    dynamic: Mapping[tuple[str, ...], Mapping[int, str]],
) -> tuple[dict[str, Any], dict[tuple[str, ...], dict[int, str]]]:
    """Example arguments with a batch of at least two and one timestep an entry, and the symbols of their dimensions."""
    sample = next(flat[i.path] for i in inputs if i.role is Role.SAMPLE)
    batch = sample.shape[0]
    repeat = 2 if batch == 1 else 1
    tensors: dict[tuple[str, ...], Tensor] = {}
    dims: dict[tuple[str, ...], dict[int, str]] = {}
    for item in inputs:
        value = flat[item.path].detach()
        dims[item.path] = dict(dynamic.get(item.path, {}))
        if item.role is Role.TIME:
            ones = [1] * (value.dim() - 1)  # some models want [B, 1], or as many dimensions as the sample has
            value = value.reshape(-1)[:1].reshape(1, *ones).expand(batch * repeat, *ones)
        if item.role is Role.TIME or (value.dim() and value.shape[0] == batch):
            # torch.export takes sizes 0 and 1 for constants.
            value = value if value.shape[0] > 1 else torch.cat([value] * repeat)
            dims[item.path][0] = "B"
        tensors[item.path] = value
    return replaced(arguments, tensors), dims


def replaced(arguments: Mapping[str, Any], values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A call's arguments with other values at some places."""

    def build(value: Any, path: tuple[str, ...]) -> Any:
        if path in values:
            return values[path]
        if (*path, "*") in values:  # a list of images, as rows
            return list(values[*path, "*"].unbind(0))
        if isinstance(value, Mapping):
            return {k: build(v, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(build(v, (*path, str(i))) for i, v in enumerate(value))
        return value

    return {k: build(v, (k,)) for k, v in arguments.items()}
