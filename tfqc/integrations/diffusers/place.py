"""Putting compiled denoisers in the places of a pipeline's own."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput

from tfqc.codegen.artifact import MANIFEST, read_manifest
from tfqc.errors import TfqcError
from tfqc.frontend.inputs import parameters_of
from tfqc.frontend.unwrap import unwrapped
from tfqc.integrations.diffusers.denoiser import TfqcDenoiser, runtime_of
from tfqc.integrations.diffusers.names import full_name
from tfqc.integrations.diffusers.part import TfqcPart
from tfqc.integrations.diffusers.parts import own_copy
from tfqc.models.find import denoisers_in


def denoisers_of(pipe: Any) -> list[str]:
    """What a pipeline calls its denoisers: one, or two experts that share its steps.

    Raises:
        TfqcError: it is no pipeline of diffusers, has no denoiser, or one that is compiled already.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TfqcError(f"A {type(pipe).__name__} is no pipeline of diffusers: give a loaded one, or tfqc.compile it.")
    if several := [name for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)]:
        raise TfqcError(
            f"{type(pipe).__name__} is made of other pipelines: quantize each of them "
            f"({', '.join(f'tfqc.quantize(pipe.{name})' for name in several)})."
        )
    parts = denoisers_in(pipe)
    if not parts:
        raise TfqcError(f"{type(pipe).__name__} has no unet, no transformer and no other denoiser to compile.")
    for part in parts:
        if isinstance(getattr(pipe, part), TfqcDenoiser):
            raise TfqcError(f"The {part} of this {type(pipe).__name__} is compiled already: load the pipeline anew.")
    return parts


def into(directory: str | Path, pipe: Any) -> Any:
    """Put saved artifacts of a pipeline's parts in their places, and return the pipeline, which is the same object.

    Args:
        directory: the denoiser's artifact; where there are several, one within it for each, under the part's name.

    Raises:
        TfqcError: the pipeline has no denoiser, or there is no artifact for it, or one of another model.
    """
    parts, directory = denoisers_of(pipe), Path(directory)
    several = not (directory / MANIFEST).is_file()
    made: dict[str, Any] = {part: _made(getattr(pipe, part), place_of(directory, part, several)) for part in parts}
    found = sorted(each.name for each in directory.iterdir() if each.is_dir()) if several and directory.is_dir() else []
    for name in dict.fromkeys(each.partition(".")[0] for each in found):
        if name in pipe.components and name not in parts:
            places = {each.partition(".")[2]: directory / each for each in found if each.partition(".")[0] == name}
            made[name] = TfqcPart(own_copy(unwrapped(getattr(pipe, name))), places)
    pipe.register_modules(**made)
    return pipe


def place_of(directory: str | Path, part: str, several: bool) -> Path:
    """Where the artifact of one of a pipeline's parts lies."""
    return Path(directory) / part if several else Path(directory)


def _made(model: Any, directory: Path) -> TfqcDenoiser:
    model, manifest = unwrapped(model), read_manifest(directory)
    if why := _is_of_another(manifest, model):
        raise TfqcError(f"{directory} holds another model than this pipeline's {type(model).__name__}: {why}.")
    facts = {
        "target": manifest["target"],
        "model_class": full_name(type(model)),
        "output_class": full_name(_output_class(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return TfqcDenoiser(directory.resolve(), dict(model.config), facts | runtime_of(manifest))


def _is_of_another(manifest: Mapping[str, Any], model: Any) -> str:
    """Why an artifact cannot be a model's, as the end of a sentence; empty where nothing speaks against it."""
    name, config = manifest["model"], dict(model.config)
    if name != type(model).__name__ and hasattr(diffusers, name):
        return f"it is a {name}"
    inputs = {item["path"][0]: item["type"].split("x") for item in manifest["inputs"]}  # Bx4x8x8xf32
    if strange := [argument for argument in inputs if argument not in parameters_of(model)]:
        return f"it takes {strange[0]!r}"
    text = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    own = {"sample": config.get("in_channels"), "encoder_hidden_states": text} if "sample" in inputs else {}
    for argument, channels in own.items():  # of U-Nets, whose configs say it in the same words
        *shape, _dtype = inputs.get(argument, [""])
        if isinstance(channels, int) and shape and str(channels) not in shape:  # videos have frames before channels
            return f"its {argument} is {'x'.join(shape)}, and this one's has {channels} channels"
    return ""


def _output_class(model: torch.nn.Module) -> type:
    """What `forward` says that it returns, where it is called with `return_dict`."""
    hints = typing.get_type_hints(model.forward).get("return")
    named = [hint for hint in (hints, *typing.get_args(hints)) if isinstance(hint, type)]
    return next((hint for hint in named if issubclass(hint, BaseOutput)), Transformer2DModelOutput)
