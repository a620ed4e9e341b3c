"""example-ir: a backend whose artifact is the program's text, run by the reference interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.codegen.artifact import Artifact
from tfqc.codegen.backend import Backend
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.codegen.support import YES, Support
from tfqc.ir.interpret import Interpreter
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.store import load_program
from tfqc.passing import Pass
from tfqc_example_plugin.swap_silu import SwapSilu


@dataclass(frozen=True)
class ExampleIrOptions:
    """Options of the target: silu, whether the device has an instruction for it."""

    silu: bool = False


class ExampleIrBackend(Backend):
    """Floating point alone, on a device that may have no SiLU."""

    name: ClassVar[str] = "example-ir"
    options: ClassVar[type[Any]] = ExampleIrOptions
    files: ClassVar[frozenset[str]] = frozenset({"program.ir", "program.safetensors"})

    def supports(self, program: Program, node: fx.Node, options: ExampleIrOptions) -> Support:
        """All but SiLU."""
        if node.target is torch.ops.aten.silu.default and not options.silu:
            return Support(False, "the device has no SiLU")
        return YES

    def pipeline(self, options: ExampleIrOptions, strategy: str) -> str:
        """The usual one, with nothing quantized."""
        return quantization_pipeline(strategy, weights=None, activations=None)

    def legalize(self, options: ExampleIrOptions) -> tuple[Pass, ...]:
        """SiLU in operations that the device has."""
        return () if options.silu else (SwapSilu(),)

    def emit(self, program: Program, options: ExampleIrOptions) -> Artifact:
        """The program as it is saved by `tfqc.ir.store`."""
        return Artifact({"program.ir": render(program)}, {"program.safetensors": program.tensors})

    def load(self, directory: Path) -> torch.nn.Module:
        """An interpreter of the program."""
        return Interpreter(load_program(directory / "program.ir"))
