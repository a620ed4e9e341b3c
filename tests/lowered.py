"""Programs on their way to kernels, as each pass of the cpu-int8 backend meets them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from tests.models import TIMES, Example
from tests.subjects import Subject, assert_text_round_trip, calibration, of_example
from tfqc.codegen.target import Target
from tfqc.instruments import CheckNumerics, VerifyEach
from tfqc.ir.program import Program
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.schedule import SamplingSchedule

STEPS = (750.0, 500.0, 250.0, 0.0)
EXACT = "cpu-int8{residual=fp32 attention=fp32}"
W8 = "calibrate-weights{method=min-max}"
A8 = "calibrate-activations{mode=per-step}"
STATIC = "calibrate-activations{mode=static}"
PER_TOKEN = "calibrate-activations{mode=per-token}"

_kept: dict[tuple[str, ...], Program] = {}


def context(its: Subject, workdir: Path) -> Context:
    """Four steps, and noise to calibrate on."""
    schedule = SamplingSchedule.of(DDIMScheduler(clip_sample=False), len(STEPS))
    return Context(schedule=schedule, calibration=calibration(its), workdir=workdir)


def quantized(its: Subject, weights: str = W8, activations: str = A8) -> Program:
    """The program behind insert-qdq, quantized by min-max; every caller has its own."""
    key = (its.name, weights, activations)
    if key not in _kept:
        text = f"select-maintenance,{weights},{activations},fold-cache,hoist-request,insert-qdq"
        with tempfile.TemporaryDirectory() as workdir:
            _kept[key] = Pipeline.parse(text.replace(",,", ",")).run(its.program, context(its, Path(workdir)))
    return _kept[key].clone()


def before(item: str, its: Subject, target: str = "cpu-int8", weights: str = W8, activations: str = A8) -> Program:
    """The program as that pass of the target meets it; every caller has its own."""
    key = (its.name, weights, activations, target, item)
    if key not in _kept:
        parsed = Target.parse(target)
        passes = parsed.backend.legalize(parsed.options)
        prefix = passes[: [p.name for p in passes].index(item)]
        _kept[key] = Pipeline(prefix).run(quantized(its, weights, activations))
    return _kept[key].clone()


def finished(its: Subject, target: str = "cpu-int8", weights: str = W8, activations: str = A8) -> Program:
    """The program that the target emits."""
    program = before("plan-memory", its, target, weights, activations)
    return Pipeline.parse("plan-memory").run(program)


def apply(text: str, program: Program) -> Program:
    """A copy after one pass, its outputs held to what the pass declares of them.

    A code that lies between two may be rounded either way, which moves the outputs of such small models by percents:
    of several inputs, one must agree as closely as declared.
    """
    (item,) = Pipeline.parse(text).passes
    result = Pipeline((item,)).run(program.clone(), None, [VerifyEach()])
    allowed = item.moves(program)
    if allowed.kind != "lossy":
        for timestep in (STEPS[0], STEPS[-1]):
            errors = (CheckNumerics(seed)._error(result, program, timestep) for seed in range(5))
            assert any(error <= allowed.tolerance for error in errors), f"{text} at {timestep:g}"
    return result


def round_trip(its: Subject, program: Program) -> None:
    """The text of the program says all of it."""
    assert_text_round_trip(program, its.call([STEPS[0], STEPS[2]]))


# -- models -------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """An image and its tokens through one of each: what the passes rewrite, with little around it."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.conv_in = nn.Conv2d(2, 16, 3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm2, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(32, 16)
        self.norm3, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.shrink, self.grow = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.conv_out = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        when = self.time(time.float()[:, None] / 1000)
        first = F.silu(self.conv_in(x))
        h = self.conv1(F.silu(self.norm1(first)) + 0.0) + when[:, :, None, None]
        h = h + first
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = (m(tokens).unflatten(2, (2, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(mixed)
        value, gate = self.wide(self.norm2(tokens)).chunk(2, dim=-1)
        tokens = self.narrow(value * F.gelu(gate)) + tokens
        hidden = F.gelu(self.up(self.norm3(tokens)), approximate="tanh")
        tokens = self.down(hidden) * torch.sigmoid(when)[:, None] + tokens
        image = tokens.transpose(1, 2).reshape(x.shape[0], 16, 6, 6)
        small = self.shrink(image)
        large = self.grow(F.interpolate(small, scale_factor=2.0))
        return self.conv_out(torch.cat([large, h], dim=1))


def example(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Example]:
    """Seeded, with a sample of that shape (batch 2) and times."""

    def made() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().eval().requires_grad_(False)
            return model, {"x": torch.randn(2, *shape), "time": TIMES}

    return made


def parts() -> Subject:
    """The model of parts."""
    return of_example("parts", _PARTS)


_PARTS = example(Parts, 2, 6, 6)
