"""Models by name: built-in ones, diffusers folders, and `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from tfqc.errors import CaptureError, suggest
from tfqc.frontend.inputs import SAMPLE_NAMES, TIME_NAMES, parameters_of
from tfqc.frontend.unwrap import unwrapped
from tfqc.models.examples import example_inputs
from tfqc.models.spec import ModelSpec
from tfqc.models.zoo import MODELS
from tfqc.quiet import quiet_import

# As pipelines of diffusers call them.
_DENOISERS = ("unet", "transformer", "unet_2", "transformer_2", "unconditional_transformer", "prior")
_CHECKPOINTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".sft")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# diffusion_pytorch_model.fp16.safetensors, and the index of such a file in parts.
_VARIANT = re.compile(
    r"diffusion_pytorch_model\.(?:(?:safetensors|bin)\.index\.(\w+)\.json|(\w+)\.(?:safetensors|bin))"
)
_PLAIN = re.compile(r"diffusion_pytorch_model(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def builtin_names() -> list[str]:
    """Names of the models that ship with tfqc."""
    return list(MODELS)


def find_model(name: str) -> ModelSpec:
    """A built-in model, a diffusers folder (of a denoiser or a whole pipeline), or `package.module:factory`.

    A factory takes no arguments and returns a `ModelSpec`, or (model, example inputs).

    Raises:
        CaptureError: nothing of that name is found, or what is found is no model.
    """
    if name in MODELS:
        return MODELS[name]()
    if Path(name).is_dir():
        return _from_folder(Path(name))
    if advice := _advice(name):
        raise CaptureError(advice)
    if ":" in name:
        return _from_factory(name)
    raise CaptureError(
        f"There is no model {name!r}: give a built-in name, a diffusers folder, or package.module:factory."
        + suggest(name, list(MODELS))
    )


def _advice(name: str) -> str:
    """What to do with what other tools take for a model; empty where it is nothing of the kind."""
    suffix = Path(name).suffix.lower()
    if suffix == ".gguf":
        return (
            f"{name} is a GGUF file, whose weights are quantized already: take the model's own weights, as a diffusers "
            "folder, or load it with diffusers (from_single_file with a GGUFQuantizationConfig), call "
            "model.dequantize(), and give tfqc.compile the model."
        )
    if suffix in _CHECKPOINTS:
        return (
            f"{name} is a checkpoint in a single file, which does not say what model it is of: load it with its "
            "pipeline (StableDiffusionXLPipeline.from_single_file(...)), and give that to tfqc.quantize or "
            "tfqc.compile, or the folder that its save_pretrained writes."
        )
    if _HUB_ID.fullmatch(name):
        return (
            f"There is no folder {name}; if it is a model of a hub, nothing is downloaded from here: "
            f"`hf download {name} --local-dir FOLDER`, and give the folder."
        )
    return ""


def denoisers_in(pipeline: Any) -> list[str]:
    """What a pipeline calls its denoisers; several where they share the steps (two experts, one for each part).

    Where it uses none of the usual names, they are the models that take a sample and a time.
    """
    named = [name for name in _DENOISERS if isinstance(getattr(pipeline, name, None), torch.nn.Module)]
    parts: dict[str, Any] = {} if named else getattr(pipeline, "components", {})
    return named or [name for name, part in parts.items() if isinstance(part, torch.nn.Module) and _denoises(part)]


def _denoises(model: torch.nn.Module) -> bool:
    names = parameters_of(model).keys()
    return not names.isdisjoint(SAMPLE_NAMES) and not names.isdisjoint(TIME_NAMES)


def denoiser_in(pipeline: Any) -> str | None:
    """What a pipeline calls its denoiser, the first of several; None where it has none."""
    return next(iter(denoisers_in(pipeline)), None)


def from_diffusers(model: Any, name: str | None = None) -> ModelSpec:
    """A spec for a diffusers denoiser, or for the denoiser of a diffusers pipeline (with its scheduler).

    Raises:
        CaptureError: the pipeline has neither a `unet` nor a `transformer`, or its example inputs are not known.
    """
    scheduler = getattr(model, "scheduler", None)
    if not isinstance(model, torch.nn.Module):
        part = denoiser_in(model)
        if part is None:
            raise CaptureError(f"{type(model).__name__} has neither a unet nor a transformer to compile.")
        model = getattr(model, part)
    model = unwrapped(model)
    return ModelSpec(name or type(model).__name__, model, example_inputs(model), scheduler)


def _from_folder(folder: Path) -> ModelSpec:
    def load(part: Path, default: str) -> Any:
        config = json.loads((part / default).read_text())
        with quiet_import():
            import diffusers

            cls = getattr(diffusers, config["_class_name"], None)
        if cls is None:
            raise CaptureError(f"{part} is a {config['_class_name']}, which this diffusers does not know.")
        if default != "config.json":
            return cls.from_config(config)
        try:
            return cls.from_pretrained(part, variant=_variant_in(part))
        except OSError as error:  # files of weights that are not there, or not whole
            raise CaptureError(f"{part} cannot be loaded: {str(error).splitlines()[0].rstrip('.')}.") from error

    scheduler = None
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = load(folder / "scheduler", "scheduler_config.json")
    for part in (folder / "unet", folder / "transformer", folder):
        if (part / "config.json").is_file():
            model = load(part, "config.json")
            return ModelSpec(folder.name, model, example_inputs(model), scheduler)
    raise CaptureError(f"{folder} is no diffusers folder: it has no config.json, no unet/ and no transformer/.")


def _variant_in(folder: Path) -> str | None:
    """What is between a weight file's name and its suffix (`fp16`) in a folder that holds no other weights.

    Raises:
        CaptureError: there are several variants, and no f16 or bf16 among them.
    """
    names = [file.name for file in folder.iterdir()]
    found = {part for name in names if (match := _VARIANT.fullmatch(name)) for part in match.groups() if part}
    if not found or any(map(_PLAIN.fullmatch, names)):
        return None
    usual = [variant for variant in ("fp16", "bf16") if variant in found]
    if len(found) > 1 and not usual:
        raise CaptureError(
            f"{folder} holds weights in several variants ({', '.join(sorted(found))}): keep one of them."
        )
    return usual[0] if usual else found.pop()


def _from_factory(name: str) -> ModelSpec:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own module stands in the current directory
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"Factory {name!r} cannot be found: {error}.") from error
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise CaptureError(f"Factory {name!r} is called without arguments, and that cannot be: {error}.") from error
    except ValueError:  # it does not say what it takes
        pass
    made = factory()
    if isinstance(made, ModelSpec):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module):
        return ModelSpec(attribute, made[0], made[1])
    raise CaptureError(
        f"Factory {name!r} returned a {type(made).__name__}, not a ModelSpec or (model, example inputs)."
    )
