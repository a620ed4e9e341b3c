"""A denoiser and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfqc.errors import CalibrationError
from tfqc.frontend.dynamic import DynamicDims
from tfqc.frontend.inputs import Example, Roles, arguments_by_name, keys_of, replaced
from tfqc.frontend.taken import inputs_of, times_beside
from tfqc.frontend.unwrap import unwrapped
from tfqc.ir.program import Input, Role
from tfqc.sampling.data import Calibration
from tfqc.sampling.loop import initial_noise

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
    example_inputs: Example
    scheduler: Any = None
    conditions: Conditions | None = None
    guidance: float = 1.0
    decode: Callable[[Tensor], Tensor] | None = None
    labels: Callable[[int, int], Tensor] | None = None
    class_names: tuple[str, ...] = ()
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=dict[str, Any])
    roles: Roles | None = None
    note: str = ""
    dynamic: DynamicDims | None = None
    shared: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.model = unwrapped(self.model)

    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one noisy sample, from the example inputs."""
        return tuple(self._noisy().shape[1:])

    def call(self, noisy: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the model: the example's, with a sample, timesteps [N], conditions by dotted name.

        All but timesteps are in the example's dtypes.
        """
        values: dict[tuple[str, ...], Tensor] = {}
        following, sample = self._following(), next(i for i, _ in self._inputs() if i.role is Role.SAMPLE)
        for item, example in self._inputs():
            name = ".".join(item.path)
            given = noisy if item == sample else conditions.get(name, example)
            if name in following:
                factor, each = following[name], example.dim() > 0 and len(example) == len(self._noisy())
                given = (factor.expand(len(noisy), *factor.shape[1:]) if each else factor) * time.flatten()[0]
            values[item.path] = time if item.role is Role.TIME else given.to(example.dtype)
        arguments = arguments_by_name(self.model, self.example_inputs)
        arguments.pop("return_dict", None)
        return replaced(arguments, values)

    def time_name(self) -> str | None:
        """The argument that the time is in; None for a model that is told none, or not one for each image."""
        return next((item.path[0] for item, _ in self._inputs() if item.role is Role.TIME), None)

    def sample_input(self) -> tuple[str, torch.dtype]:
        """What is denoised: its dotted name, and what it is given as."""
        return next((".".join(i.path), value.dtype) for i, value in self._inputs() if i.role is Role.SAMPLE)

    def request_rows(self) -> dict[str, Tensor]:
        """The example's first row of each request input, as a batch of one."""
        return {name: value[:1] for name, value in self._per_image().items()}

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
        noise = self._noise(images, seed)
        per_image = {*cond, *self._per_image()}
        shared = {k: v for k, v in self._requests().items() if k not in per_image}
        beside = self._beside(images, seed)
        cond, shared = {**cond, **beside[0]}, {**shared, **beside[1]}
        uncond = None if uncond is None else {**uncond, **beside[0]}
        return Calibration(noise, cond, uncond, self.guidance, batch_size, seed, shared, self._following())

    def _noise(self, images: int, seed: int) -> Tensor:
        """Unit noise; for a sample of whole numbers, such as tokens, the example's in any order."""
        example = self._noisy()
        if example.is_floating_point():
            return initial_noise(images, self.sample_shape(), seed)
        picked = torch.randint(
            example.numel(), (images, *example.shape[1:]), generator=torch.Generator().manual_seed(seed)
        )
        return example.flatten()[picked].float()

    def _beside(self, images: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is denoised beside the sample: noise for all steps, a row for each image, or as the example has it."""
        times, per_image, shared = self._following(), dict[str, Tensor](), dict[str, Tensor]()
        found = [(".".join(i.path), value) for i, value in self._inputs() if i.role is Role.SAMPLE][1:]
        for number, (name, value) in enumerate(found, 1):
            if name in times:
                continue
            if value.dim() > 1 and len(value) == len(self._noisy()) and value.is_floating_point():
                per_image[name] = initial_noise(images, tuple(value.shape[1:]), seed + number)
            else:
                shared[name] = value
        return per_image, shared

    def _following(self) -> dict[str, Tensor]:
        """Times beside the one of the schedule, as multiples of it: of the example's, or else of their own largest."""
        inputs, found = self._inputs(), dict[str, Tensor]()
        clock = next((float(value.flatten()[0]) for item, value in inputs if item.role is Role.TIME), 0.0)
        beside = times_beside(self.model, self.example_inputs, self.roles)
        for item, value in inputs:
            if (name := ".".join(item.path)) in beside:
                unit = clock or float(value.abs().max()) or 1.0
                row = value[:1] if value.dim() and len(value) == len(self._noisy()) else value
                found[name] = row.float() / unit
        return found

    def calibration_of(self, given: Tensor | Mapping[str, Any], seed: int = 0) -> Calibration:
        """Calibration data from unit noise [N, ...], or from inputs by name, nested as the model takes them.

        Inputs of N rows are the images', others are shared by all. What is not given is drawn as by `calibration`.

        Raises:
            CalibrationError: a name that is no input, a time, or a shape that is not the example's behind the rows.
        """
        known = {".".join(item.path): (item.role, value) for item, value in self._inputs()}
        noisy = next(name for name, (role, _) in known.items() if role is Role.SAMPLE)
        if isinstance(given, Tensor):
            given = {noisy: given}
        leaves = pytree.tree_flatten_with_path(dict(given))[0]
        tensors = {".".join(keys_of(path)): leaf for path, leaf in leaves if leaf is not None}
        for name, value in tensors.items():
            role, example = known.get(name, (None, None))
            if example is None or role is Role.TIME:
                why = "is no input of the model" if example is None else "is the time, which the schedule tells"
                raise CalibrationError(f"calibration: {name!r} {why}; it takes {', '.join(known)}.")
            if not isinstance(value, Tensor) or value.shape[1:] != example.shape[1:] or value.dim() != example.dim():
                shape = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise CalibrationError(f"calibration: {name} is {shape}, and the example is {list(example.shape)}.")
        rows = {noisy: 0} if noisy in tensors else self._per_image()
        drawn = self.calibration(next((len(value) for name, value in tensors.items() if name in rows), 16), seed)
        return replace(
            drawn,
            latents=tensors.get(noisy, drawn.latents),
            cond={name: tensors.get(name, value) for name, value in drawn.cond.items()},
            shared={name: tensors.get(name, value) for name, value in drawn.shared.items()},
        )

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
