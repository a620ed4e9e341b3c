"""tfqc, the Temporal-Feature Quantization Compiler.

    program  = tfqc.capture(unet, example_inputs)
    artifact = tfqc.compile(unet, target="fake-quant{weights=4 activations=8}", schedule=scheduler, steps=50)
    artifact.save("out")
    unet = tfqc.load("out")
"""

__version__ = "0.1.0"

from tfqc.calibration import Calibration
from tfqc.capture import capture
from tfqc.driver import compile, load
from tfqc.errors import TfqcError
from tfqc.ir import Program, parse, render
from tfqc.models import ModelSpec
from tfqc.passing import Context, Pass
from tfqc.pipeline import Pipeline
from tfqc.schedule import SamplingSchedule
from tfqc.target import Target

__all__ = [
    "Calibration", "Context", "ModelSpec", "Pass", "Pipeline", "Program", "SamplingSchedule", "Target", "TfqcError",
    "capture", "compile", "load", "parse", "render",
]  # fmt: skip
