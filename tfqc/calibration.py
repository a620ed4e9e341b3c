"""Calibration data: a few images' noise and request inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfqc.errors import CalibrationError


@dataclass(frozen=True)
class Calibration:
    """What to sample for calibration.

    latents: unit normal noise [N, ...] f32. cond, uncond: request inputs by dotted name (`added_cond_kwargs.time_ids`),
    [N, ...] each; `uncond` is None without classifier-free guidance. shared: request inputs that have no row for each
    image (rotary ids), as the model takes them. seed: what `latents` were drawn from, for the record.

    Raises:
        CalibrationError: no images, row counts that differ, NaN or infinity.
    """

    latents: Tensor
    cond: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor] | None = None
    guidance: float = 2.0
    batch_size: int = 16
    seed: int = 0
    shared: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        if len(self.latents) == 0:
            raise CalibrationError("Calibration needs at least one image: latents has no rows.")
        per_image = [("latents", self.latents), *self.cond.items(), *(self.uncond or {}).items()]
        for name, tensor in per_image:
            if tensor.dim() == 0 or len(tensor) != len(self.latents):
                rows = len(tensor) if tensor.dim() else "no"
                raise CalibrationError(
                    f"Calibration: {name} has {rows} rows, latents {len(self.latents)}; what all images share is given "
                    "as shared={...}."
                )
        for name, tensor in [*per_image, *self.shared.items()]:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(f"Calibration: {name} holds NaN or infinity.")

    def __len__(self) -> int:
        return len(self.latents)

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        tensors = {"latents": self.latents, **{f"cond.{k}": v for k, v in self.cond.items()}}
        tensors |= {f"uncond.{k}": v for k, v in (self.uncond or {}).items()}
        tensors |= {f"shared.{k}": v for k, v in self.shared.items()}
        facts = {"guidance": repr(self.guidance), "batch_size": str(self.batch_size), "seed": str(self.seed)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, facts)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Inverse of `save`.

        Raises:
            CalibrationError: the file is no calibration data.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
            tensors = load_file(path)
            cond, uncond, shared = (
                {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
                for part in ("cond.", "uncond.", "shared.")
            )
            return cls(
                tensors["latents"],
                cond,
                uncond or None,
                float(facts["guidance"]),
                int(facts["batch_size"]),
                int(facts["seed"]),
                shared,
            )
        except (OSError, KeyError, SafetensorError) as error:
            raise CalibrationError(f"{path} holds no calibration data: {error}") from error
