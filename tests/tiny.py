"""A denoiser of a dozen operations, and passes over it, for tests of what surrounds passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of
from tfqc.frontend import capture
from tfqc.ir.edit import Rewriter
from tfqc.ir.program import Program, Stage
from tfqc.passing import Context, Pass


class Tiny(nn.Module):
    """A convolution whose channels a time MLP shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 4, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 4))
        self.conv_out = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep[:, None].to(torch.float32) / 1000)
        return self.conv_out(F.silu(self.conv_in(sample) + shift[:, :, None, None]))


INPUTS = {
    "sample": torch.linspace(-1, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4),
    "timestep": torch.tensor([7, 421]),
}


@functools.cache
def _captured() -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tiny().requires_grad_(False)
    return capture(model, INPUTS)


def tiny() -> Program:
    """The captured program; every caller has its own."""
    return _captured().clone()


def make_pass(name: str, run: Callable[[Program, Context], None] = lambda program, ctx: None, **declared: Any) -> Pass:
    """A pass of no options that does `run` and declares `declared`."""

    class Made(Pass):
        pass

    Made.name = name
    for key, value in declared.items():
        setattr(Made, key, value)
    Made.run = lambda self, program, ctx: run(program, ctx)  # type: ignore[method-assign]
    return dataclass(frozen=True)(Made)()


def scale_output(factor: float) -> Callable[[Program, Context], None]:
    """What a pass does that multiplies the model's output."""

    def run(program: Program, ctx: Context) -> None:
        output = next(n for n in program.step.nodes if n.op == "output")
        result = output.args[0]
        scaled = program.insert(output, torch.ops.aten.mul.Tensor, (result, factor), name="scaled")
        output.args = (scaled,)

    return run


@dataclass(frozen=True)
class Explode(Pass):
    """Fails when told to: a pass that can be looked up by name once a test has registered it."""

    name: ClassVar[str] = "explode"
    needs: ClassVar[Stage] = Stage.CAPTURED
    why: str = "no reason"

    def run(self, program: Program, ctx: Context) -> None:
        """Half an edit, then the failure."""
        scale_output(2.0)(program, ctx)
        raise KeyError(self.why)


@dataclass(frozen=True)
class Sloppy(Pass):
    """Declares that it changes nothing, and multiplies every SiLU by 1.1."""

    name: ClassVar[str] = "sloppy"

    def run(self, program: Program, ctx: Context) -> None:
        """Write a product behind each SiLU, under the name that the SiLU had."""
        for node in [n for n in program.nodes() if n.target is torch.ops.aten.silu.default]:
            (x,) = args_of(node)
            inner = program.insert(node, torch.ops.aten.silu.default, (x,), name="bare")
            Rewriter(program).become(node, torch.ops.aten.mul.Tensor, inner, 1.1)
