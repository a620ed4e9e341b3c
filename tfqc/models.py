"""Models by name: built-in ones, diffusers folders, and `package.module:factory`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.calibration import Calibration
from tfqc.errors import CaptureError, suggest
from tfqc.examples import example_inputs
from tfqc.frontend.inputs import arguments_by_name, inputs_of, replaced
from tfqc.ir.program import Input, Role
from tfqc.quiet import quiet_import
from tfqc.sampling import initial_noise

Conditions = Callable[[int, int], tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]]


@dataclass
class ModelSpec:
    """A denoiser and what belongs to it.

    model: the denoiser. example_inputs: for the capture. scheduler: a diffusers scheduler, or None.
    conditions: (n, seed) -> (cond, uncond) request inputs by dotted name, n rows each; uncond None without guidance.
    decode: latents -> images [N, C, H, W] in 0..1, or None. labels: (n, seed) -> class labels [n], where images have
    classes; class_names: what they are called. metrics: name -> function of (images, labels). roles: of the inputs,
    where names do not tell. dynamic: further symbolic dimensions, as `capture` has them. shared: request inputs that
    are one for all images, though they have as many rows as the example has images.
    """

    name: str
    model: torch.nn.Module
    example_inputs: Mapping[str, Any]
    scheduler: Any = None
    conditions: Conditions | None = None
    guidance: float = 1.0
    decode: Callable[[Tensor], Tensor] | None = None
    labels: Callable[[int, int], Tensor] | None = None
    class_names: tuple[str, ...] = ()
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=dict[str, Any])
    roles: Mapping[str, str] | None = None
    note: str = ""
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    shared: frozenset[str] = frozenset()

    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one noisy sample, from the example inputs."""
        return tuple(self._noisy().shape[1:])

    def call(self, noisy: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the model: the example's, with a sample, timesteps [N], conditions by dotted name."""
        given = {Role.SAMPLE: noisy, Role.TIME: time}
        values = {i.path: given.get(i.role, conditions.get(".".join(i.path), v)) for i, v in self._inputs()}
        arguments = arguments_by_name(self.model, self.example_inputs)
        arguments.pop("return_dict", None)
        return replaced(arguments, values)

    def _inputs(self) -> list[tuple[Input, Tensor]]:
        return inputs_of(self.model, self.example_inputs, self.roles)

    def _noisy(self) -> Tensor:
        return next(value for item, value in self._inputs() if item.role is Role.SAMPLE)

    def _per_image(self) -> dict[str, Tensor]:
        """Request inputs that have a row for each image."""
        images = self._noisy().shape[0]
        return {
            k: v for k, v in self._requests().items() if k not in self.shared and v.dim() > 0 and v.shape[0] == images
        }

    def calibration(self, images: int = 16, seed: int = 0, batch_size: int = 16) -> Calibration:
        """Noise and request inputs of a few images; conditions are random numbers where the model has no others."""
        cond, uncond = (self.conditions or self._random_conditions)(images, seed)
        noise = initial_noise(images, self.sample_shape(), seed)
        per_image = {*cond, *self._per_image()}
        shared = {k: v for k, v in self._requests().items() if k not in per_image}
        return Calibration(noise, cond, uncond, self.guidance, batch_size, seed, shared)

    @property
    def conditions_are_random(self) -> bool:
        """True if calibration has to invent the request inputs."""
        return self.conditions is None and bool(self._requests())

    def _requests(self) -> dict[str, Tensor]:
        return {".".join(item.path): value for item, value in self._inputs() if item.role is Role.REQUEST}

    def _random_conditions(self, n: int, seed: int) -> tuple[dict[str, Tensor], None]:
        generator = torch.Generator().manual_seed(seed)
        cond: dict[str, Tensor] = {}
        for name, example in self._per_image().items():
            shape = (n, *example.shape[1:])
            if example.is_floating_point():
                cond[name] = torch.randn(shape, generator=generator).to(example.dtype)
            else:
                cond[name] = example[:1].expand(shape).clone()
        return cond, None


def builtin_names() -> list[str]:
    """Names of the models that ship with tfqc."""
    from tfqc.zoo import MODELS

    return list(MODELS)


def find_model(name: str) -> ModelSpec:
    """A built-in model, a diffusers folder (of a denoiser or a whole pipeline), or `package.module:factory`.

    A factory takes no arguments and returns a `ModelSpec`, or (model, example inputs).

    Raises:
        CaptureError: nothing of that name is found, or what is found is no model.
    """
    from tfqc.zoo import MODELS

    if name in MODELS:
        return MODELS[name]()
    if Path(name).is_dir():
        return _from_folder(Path(name))
    if ":" in name:
        return _from_factory(name)
    raise CaptureError(
        f"There is no model {name!r}: give a built-in name, a diffusers folder, or package.module:factory."
        + suggest(name, list(MODELS))
    )


def from_diffusers(model: Any, name: str | None = None) -> ModelSpec:
    """A spec for a diffusers denoiser, or for the denoiser of a diffusers pipeline (with its scheduler).

    Raises:
        CaptureError: the pipeline has neither a `unet` nor a `transformer`, or its example inputs are not known.
    """
    scheduler = getattr(model, "scheduler", None)
    if not isinstance(model, torch.nn.Module):
        denoiser = getattr(model, "unet", None) or getattr(model, "transformer", None)
        if denoiser is None:
            raise CaptureError(f"{type(model).__name__} has neither a unet nor a transformer to compile.")
        model = denoiser
    return ModelSpec(name or type(model).__name__, model, example_inputs(model), scheduler)


def _from_folder(folder: Path) -> ModelSpec:
    def load(part: Path, default: str) -> Any:
        config = json.loads((part / default).read_text())
        with quiet_import():
            import diffusers

            cls = getattr(diffusers, config["_class_name"], None)
        if cls is None:
            raise CaptureError(f"{part} is a {config['_class_name']}, which this diffusers does not know.")
        return cls.from_pretrained(part) if default == "config.json" else cls.from_config(config)

    scheduler = None
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = load(folder / "scheduler", "scheduler_config.json")
    for part in (folder / "unet", folder / "transformer", folder):
        if (part / "config.json").is_file():
            model = load(part, "config.json")
            return ModelSpec(folder.name, model, example_inputs(model), scheduler)
    raise CaptureError(f"{folder} is no diffusers folder: it has no config.json, no unet/ and no transformer/.")


def _from_factory(name: str) -> ModelSpec:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own module stands in the current directory
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"Factory {name!r} cannot be found: {error}.") from error
    made = factory()
    if isinstance(made, ModelSpec):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module):
        return ModelSpec(attribute, made[0], made[1])
    raise CaptureError(
        f"Factory {name!r} returned a {type(made).__name__}, not a ModelSpec or (model, example inputs)."
    )
