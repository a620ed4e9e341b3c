"""Calibration data: a few images' noise and request inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_tensors, write_tensors

_NEEDED = ("latents", "guidance", "batch_size", "seed")


@dataclass(frozen=True)
class Calibration:
    """What to sample for calibration.

    latents: unit normal noise [N, ...]; f32 here, whatever it was given in. cond, uncond: request inputs by dotted name
    (`added_cond_kwargs.time_ids`), [N, ...] each; `uncond` is None without classifier-free guidance. shared: request
    inputs that have no row for each image (rotary ids), as the model takes them. following: times beside the one of the
    schedule, of tokens or frames, as multiples of it; one row where all images have the same. seed: what `latents` were
    drawn from, for the record.

    Raises:
        CalibrationError: no images, row counts that differ, NaN or infinity, names or types that do not agree, a
            batch size below 1.
    """

    latents: Tensor
    cond: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor] | None = None
    guidance: float = 2.0
    batch_size: int = 16
    seed: int = 0
    shared: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    following: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        _check_number("batch_size", self.batch_size, lambda n: isinstance(n, int) and n >= 1, "a whole number above 0")
        _check_number("seed", self.seed, lambda n: isinstance(n, int), "a whole number")
        _check_number("guidance", self.guidance, math.isfinite, "a finite number")
        per_image = [("latents", self.latents), *self.cond.items(), *(self.uncond or {}).items()]
        others = [*self.shared.items(), *self.following.items()]
        for name, tensor in [*per_image, *others]:
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] (comes from callers)
                raise CalibrationError(f"Calibration: {name} is a {type(tensor).__name__}, no tensor.")
        if not self.latents.is_floating_point() or self.latents.dim() == 0:
            raise CalibrationError(
                f"Calibration: latents must be noise [N, ...] in floating point, not {self.latents.dtype} of rank "
                f"{self.latents.dim()}."
            )
        object.__setattr__(self, "latents", self.latents.float())
        if len(self.latents) == 0:
            raise CalibrationError("Calibration needs at least one image: latents has no rows.")
        for name, tensor in per_image:
            if tensor.dim() == 0 or len(tensor) != len(self.latents):
                rows = len(tensor) if tensor.dim() else "no"
                raise CalibrationError(
                    f"Calibration: {name} has {rows} rows, latents {len(self.latents)}; what all images share is given "
                    "as shared={...}."
                )
        for name, tensor in [*per_image, *others]:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(f"Calibration: {name} holds NaN or infinity.")
        self._check_names()

    def _check_names(self) -> None:
        if bad := [n for n in [*self.cond, *self.shared] if not all(n.split("."))]:
            raise CalibrationError(f"Calibration: {bad[0]!r} is no name of an input.")
        if both := sorted(self.cond.keys() & self.shared.keys()):
            raise CalibrationError(f"Calibration: {both[0]} is given for each image and as shared by all.")
        for name in sorted(self.cond.keys() | self.uncond.keys()) if self.uncond is not None else ():
            one, other = self.cond.get(name), self.uncond.get(name) if self.uncond is not None else None
            if one is None or other is None:
                raise CalibrationError(f"Calibration: {name} is in one of cond and uncond alone; they have the same.")
            if one.shape != other.shape or one.dtype != other.dtype:
                raise CalibrationError(
                    f"Calibration: {name} is {one.dtype} {list(one.shape)} in cond, {other.dtype} {list(other.shape)} "
                    "in uncond."
                )

    def __len__(self) -> int:
        return len(self.latents)

    def in_batches(self, images: int) -> Calibration:
        """For a model that computes so many images at once: as many as fill batches of them, the first ones again where
        there are too few, without guidance, which would call the model with twice as many."""
        picked = torch.arange(-(-len(self) // images) * images) % len(self)
        cond = {name: value[picked] for name, value in self.cond.items()}
        return replace(self, latents=self.latents[picked], cond=cond, uncond=None, batch_size=images)

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        tensors = {"latents": self.latents, **{f"cond.{k}": v for k, v in self.cond.items()}}
        tensors |= {f"uncond.{k}": v for k, v in (self.uncond or {}).items()}
        tensors |= {f"shared.{k}": v for k, v in self.shared.items()}
        tensors |= {f"following.{k}": v for k, v in self.following.items()}
        facts = {"guidance": repr(self.guidance), "batch_size": str(self.batch_size), "seed": str(self.seed)}
        write_tensors(path, tensors, facts)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Inverse of `save`.

        Raises:
            CalibrationError: the file is no calibration data.
        """
        try:
            tensors, facts = read_tensors(path, CalibrationError)
            parts: dict[str, dict[str, Tensor]] = {"cond": {}, "uncond": {}, "shared": {}, "following": {}}
            latents = tensors.pop("latents")
            for name, tensor in tensors.items():
                part, _, name = name.partition(".")
                parts[part][name] = tensor
            guidance, batch_size, seed = float(facts["guidance"]), int(facts["batch_size"]), int(facts["seed"])
        except KeyError as error:
            (name,) = error.args
            what = f"there is no {name}" if name in _NEEDED else f"{name[:100]!a} is no part of them"
            raise CalibrationError(f"{path} holds no calibration data: {what}.") from error
        except (CalibrationError, ValueError) as error:
            raise CalibrationError(f"{path} holds no calibration data: {str(error)[:300].rstrip('.')}.") from error
        uncond = parts["uncond"] or None
        return cls(latents, parts["cond"], uncond, guidance, batch_size, seed, parts["shared"], parts["following"])


def _check_number(name: str, value: Any, fits: Callable[[Any], bool], what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise CalibrationError(f"Calibration: {name} is {str(value)[:50]!r}, not {what}.")
