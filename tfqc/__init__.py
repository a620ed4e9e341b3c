"""tfqc, the Temporal-Feature Quantization Compiler.

    program  = tfqc.capture(unet, example_inputs)
    artifact = tfqc.compile(unet, target="fake-quant{weights=4 activations=8}", schedule=scheduler, steps=50)
    artifact.save("out")
    unet = tfqc.load("out")

Names are loaded when they are first used, so that `tfqc --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfqc.version import __version__ as __version__

if TYPE_CHECKING:
    from tfqc.codegen.target import Target
    from tfqc.driver import compile, load
    from tfqc.errors import TfqcError
    from tfqc.frontend import capture
    from tfqc.integrations.diffusers.denoiser import TfqcDenoiser
    from tfqc.integrations.diffusers.part import TfqcPart
    from tfqc.integrations.diffusers.quantize import quantize
    from tfqc.ir import Program, parse, render
    from tfqc.models.spec import ModelSpec
    from tfqc.passing.base import Pass
    from tfqc.passing.context import Context
    from tfqc.passing.pipeline import Pipeline
    from tfqc.recipe import Recipe
    from tfqc.sampling.data import Calibration
    from tfqc.sampling.schedule import SamplingSchedule

__all__ = [
    "Calibration", "Context", "ModelSpec", "Pass", "Pipeline", "Program", "Recipe", "SamplingSchedule", "Target",
    "TfqcDenoiser", "TfqcError", "TfqcPart",
    "capture", "compile", "load", "parse", "quantize", "render",
]  # fmt: skip

_HOMES = {
    "Calibration": "tfqc.sampling.data", "Context": "tfqc.passing", "ModelSpec": "tfqc.models.spec",
    "Pass": "tfqc.passing", "Pipeline": "tfqc.passing.pipeline", "Program": "tfqc.ir", "Recipe": "tfqc.recipe",
    "SamplingSchedule": "tfqc.sampling.schedule", "Target": "tfqc.codegen.target", "TfqcError": "tfqc.errors",
    "ModelMixin": "diffusers", "TfqcDenoiser": "tfqc.integrations.diffusers.denoiser",
    "TfqcPart": "tfqc.integrations.diffusers.part",
    "quantize": "tfqc.integrations.diffusers.quantize",
    "capture": "tfqc.frontend", "compile": "tfqc.driver", "load": "tfqc.driver", "parse": "tfqc.ir",
    "render": "tfqc.ir",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
