"""Putting a compiled denoiser in the place of a pipeline's own."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput

from tfqc.codegen.artifact import read_manifest
from tfqc.errors import TfqcError
from tfqc.integrations.diffusers.denoiser import TfqcDenoiser
from tfqc.models.find import denoiser_in


def denoiser_of(pipe: Any) -> str:
    """What a pipeline calls its denoiser.

    Raises:
        TfqcError: it is no pipeline of diffusers, has no denoiser, or one that is compiled already.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TfqcError(f"A {type(pipe).__name__} is no pipeline of diffusers: give a loaded one, or tfqc.compile it.")
    part = denoiser_in(pipe)
    if part is None:
        raise TfqcError(f"{type(pipe).__name__} has neither a unet nor a transformer to compile.")
    if isinstance(getattr(pipe, f"{part}_2", None), torch.nn.Module):
        raise TfqcError(
            f"{type(pipe).__name__} has two denoisers, {part} and {part}_2: compile each with tfqc.compile, on calls "
            "of its own."
        )
    if isinstance(getattr(pipe, part), TfqcDenoiser):
        raise TfqcError(f"The {part} of this {type(pipe).__name__} is compiled already: load the pipeline anew.")
    return part


def into(directory: str | Path, pipe: Any) -> Any:
    """Put a saved artifact of a pipeline's denoiser in its place, and return the pipeline, which is the same object.

    Raises:
        TfqcError: the pipeline has no denoiser, or the artifact was compiled from another class of model.
    """
    part = denoiser_of(pipe)
    model, manifest = getattr(pipe, part), read_manifest(directory)
    facts = {
        "target": manifest["target"],
        "model_class": _full_name(type(model)),
        "output_class": _full_name(_output_class(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    made = TfqcDenoiser(Path(directory).resolve(), dict(model.config), facts)
    pipe.register_modules(**{part: made})
    return pipe


def _output_class(model: torch.nn.Module) -> type:
    """What `forward` says that it returns, where it is called with `return_dict`."""
    hints = typing.get_type_hints(model.forward).get("return")
    named = [hint for hint in (hints, *typing.get_args(hints)) if isinstance(hint, type)]
    return next((hint for hint in named if issubclass(hint, BaseOutput)), Transformer2DModelOutput)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
