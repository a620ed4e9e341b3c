"""All denoiser classes of diffusers: a small configuration and the calls of its pipeline for each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from tests.zoo.denoisers import audio, images, others, packed, unets, videos
from tests.zoo.denoisers.entry import Denoiser

DENOISERS: dict[str, Denoiser] = {
    **unets.DENOISERS, **images.DENOISERS, **packed.DENOISERS, **videos.DENOISERS, **audio.DENOISERS,
        **others.DENOISERS,
}  # fmt: skip

# Models of diffusers.models.{unets,transformers,controlnets} that predict no noise.
_RESIDUALS = "gives residuals that a denoiser takes as inputs"
NO_DENOISERS = {
    "MotionAdapter": "holds layers for a UNetMotionModel, and is never called",
    "ControlNetXSAdapter": "holds layers for a UNetControlNetXSModel, and is never called",
    "MiniMaxMusic3RVQDepthDecoder": "predicts codes one after the other, without noise or time",
    "ControlNetModel": _RESIDUALS,
    "ControlNetUnionModel": _RESIDUALS,
    "CosmosControlNetModel": _RESIDUALS,
    "FluxControlNetModel": _RESIDUALS,
    "FluxMultiControlNetModel": _RESIDUALS,
    "HunyuanDiT2DControlNetModel": _RESIDUALS,
    "HunyuanDiT2DMultiControlNetModel": _RESIDUALS,
    "MultiControlNetModel": _RESIDUALS,
    "MultiControlNetUnionModel": _RESIDUALS,
    "QwenImageControlNetModel": _RESIDUALS,
    "QwenImageMultiControlNetModel": _RESIDUALS,
    "SD3ControlNetModel": _RESIDUALS,
    "SD3MultiControlNetModel": _RESIDUALS,
    "SanaControlNetModel": _RESIDUALS,
    "SparseControlNetModel": _RESIDUALS,
    "ZImageControlNetModel": _RESIDUALS,
}


def classes_of_diffusers() -> set[str]:
    """Names of all models in the packages of diffusers that hold denoisers."""
    import diffusers

    found: set[str] = set()
    for part in ("unets", "transformers", "controlnets"):
        package = importlib.import_module(f"diffusers.models.{part}")
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            found |= {
                name
                for name, value in vars(module).items()
                if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin) and value.__module__ == info.name
            }
    return found
