"""What a pipeline calls beside its denoisers: text encoders, whole, and the halves of autoencoders. None has a time."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tfqc.codegen.artifact import Artifact
from tfqc.codegen.target import Target
from tfqc.driver import compile
from tfqc.errors import CalibrationError, CaptureError
from tfqc.frontend.inputs import TIME_NAMES, parameters_of
from tfqc.frontend.unwrap import unwrapped
from tfqc.integrations.diffusers.datafree import without_data
from tfqc.ir.program import Role
from tfqc.models.find import denoisers_in
from tfqc.progress import Progress
from tfqc.sampling.recording import Recording

DENOISER, ALL = "denoiser", "all"
_HALVES = ("encoder", "decoder")


def beside(pipe: Any, wanted: str | Sequence[str]) -> dict[str, torch.nn.Module]:
    """Modules to compile beside the denoisers, by component and place in it: `text_encoder`, `vae.decoder`.

    Args:
        wanted: "denoiser" (none of them), "all", or names of components.

    Raises:
        CalibrationError: there is no such component.
    """
    if wanted == DENOISER:
        return {}
    there = {name: unwrapped(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    others = [name for name in there if name not in denoisers_in(pipe) and not _timed(there[name])]
    names = others if wanted == ALL else [wanted] if isinstance(wanted, str) else list(wanted)
    if unknown := [name for name in names if name not in others]:
        raise CalibrationError(
            f"parts={wanted!r}: {type(pipe).__name__} has no {unknown[0]!r} to compile beside its denoiser; it has "
            f"{', '.join(others) or 'nothing'}, and 'all' means each of them."
        )
    found: dict[str, torch.nn.Module] = {}
    for name in names:
        model = there[name]
        halves = {f"{name}.{half}": getattr(model, half, None) for half in _HALVES} if hasattr(model, "decode") else {}
        found |= {place: module for place, module in halves.items() if isinstance(module, torch.nn.Module)} or {
            name: model
        }
    return found


def compile_part(
    module: torch.nn.Module, recordings: Sequence[Recording], target: Target, seed: int, progress: Progress
) -> Artifact:
    """Compile a module on the calls that were recorded of it, for other sizes, too, where it can be captured for them.

    A module of tokens has activations with ranges of each token where the target has such: in text encoders a few
    tokens are far larger than all others.

    Raises:
        TfqcError: what of it cannot be captured or compiled.
    """
    calls = [dict(call) for recording in recordings for call in recording.calls]
    fixed = {"return_dict": value} if (value := calls[0].pop("return_dict", None)) is not None else {}
    calls = [{k: v for k, v in call.items() if k != "return_dict" and v is not None} for call in calls]
    first = calls[0]
    tensors = {name: value for name, value in first.items() if isinstance(value, Tensor)}
    if not tensors or not next(iter(tensors.values())).dim():
        raise CaptureError(f"{type(module).__name__} is called without a tensor, so there is nothing to compile.")
    sample, *others = tensors
    sizes = _sizes(tensors, sample)
    pipeline = None
    if tensors[sample].dim() < 4:
        with contextlib.suppress(CalibrationError):  # where it has no such ranges
            target, pipeline = without_data(target, "fold")
    given: dict[str, Any] = {
        "target": target,
        "pipeline": pipeline,
        "calibration": [call for call in calls if call.keys() == first.keys()],
        "example_inputs": first,
        "roles": {sample: str(Role.SAMPLE), **dict.fromkeys(others, str(Role.REQUEST))},
        "seed": seed,
        "progress": progress,
    }
    kind = type(type(module).__name__, (_Named,), {})  # by that name errors speak of it
    named = kind(module, list(first), fixed)
    try:
        return compile(named, dynamic=sizes, **given)
    except CaptureError:
        return compile(named, **given)


class _Named(torch.nn.Module):
    """A module whose `forward` names the arguments that it is called with; they may be in its `**kwargs`."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module

        def forward(**values: Any) -> Any:
            return module(**values, **fixed)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # pyright: ignore
        self.forward = forward


def own_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A model with the same tensors, whose modules can be changed."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _sizes(tensors: Mapping[str, Tensor], sample: str) -> dict[str, dict[int, str]]:
    """Height and width of images, or how many tokens there are, in each tensor that has as many."""
    shape = tensors[sample].shape
    if len(shape) >= 4:
        return {sample: {len(shape) - 2: "H", len(shape) - 1: "W"}}
    if len(shape) < 2:
        return {}
    return {name: {1: "S"} for name, value in tensors.items() if value.dim() > 1 and value.shape[1] == shape[1]}


def _timed(module: torch.nn.Module) -> bool:
    return not TIME_NAMES.isdisjoint(parameters_of(module))
