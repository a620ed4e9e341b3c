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

if TYPE_CHECKING:
    from tfqc.calibration import Calibration
    from tfqc.driver import compile, load
    from tfqc.errors import TfqcError
    from tfqc.frontend import capture
    from tfqc.ir import Program, parse, render
    from tfqc.models import ModelSpec
    from tfqc.passing import Context, Pass
    from tfqc.pipeline import Pipeline
    from tfqc.schedule import SamplingSchedule
    from tfqc.target import Target

__version__ = "0.1.0"
__all__ = [
    "Calibration", "Context", "ModelSpec", "Pass", "Pipeline", "Program", "SamplingSchedule", "Target", "TfqcError",
    "capture", "compile", "load", "parse", "render",
]  # fmt: skip

_HOMES = {
    "Calibration": "tfqc.calibration", "Context": "tfqc.passing", "ModelSpec": "tfqc.models", "Pass": "tfqc.passing",
    "Pipeline": "tfqc.pipeline", "Program": "tfqc.ir", "SamplingSchedule": "tfqc.schedule", "Target": "tfqc.target",
    "TfqcError": "tfqc.errors", "capture": "tfqc.frontend", "compile": "tfqc.driver", "load": "tfqc.driver",
    "parse": "tfqc.ir", "render": "tfqc.ir",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
