"""TDQ (arXiv 2306.02316): the step of a quantizer as a function of time, s(t) = Softplus(MLP(sinusoid(t))).

The networks of all inputs are one stack of matrices and are computed side by side. They are written once, over a
function that calls operations: `eager` computes them, another one may write them into a program.

In training, gradients reach the networks of `steps_at` through `tfqc.quant.grid.fake_quantize` as they reach weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tfqc.ir.tables import Row, row_kind

aten = torch.ops.aten
WIDTH = 64  # of the hidden layers
WAVES = 32  # frequencies of the sinusoid, of each a cosine and a sine
SLOWEST = 1e-4  # frequency, of the fastest one
LEAST = torch.finfo(torch.float32).tiny  # step, of which there is a reciprocal
SILU_LEAST = -0.2785
Grids = Literal["full", "released"]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Codes:
    """The grid of an input: codes 0 .. `top`, of which one between `least` and `most` is zero. With `offset`, the grid
    reaches that far below zero, whatever its step; without, the zero point is `least`, which is `most`.
    """

    top: int
    least: int
    most: int
    offset: float = 0.0

    @staticmethod
    def of(bits: int, grid: Grids, low: float, high: float) -> Codes:
        """For an input with values from `low` to `high`.

        What reaches no further below zero than SiLU does, and far less than above, has a grid that begins there, any
        other a symmetric one. `released` are the grids of the paper's code, in which codes stay unused: n // 2 - 1 each
        side of zero, n - 1 above SiLU's least value, n = 2^bits - 1.
        """
        n = 2**bits - 1
        if low >= SILU_LEAST and -4 * low <= high:
            top = n if grid == "full" else n - 1
            return Codes(top, 0, top, max(-low, 0.0))
        half = n // 2 - 1
        return Codes(2 * half, half, half) if grid == "released" else Codes(n, n // 2 + 1, n // 2 + 1)

    @property
    def is_symmetric(self) -> bool:
        """True for codes around the middle."""
        return self.least == self.most

    def zero_point(self, step: Tensor) -> Tensor:
        """The code of zero, in floating point."""
        return (step.reciprocal() * self.offset).round().clamp(self.least, self.most)

    def step_for(self, low: Tensor, high: Tensor) -> Tensor:
        """The least step that clips nothing between `low` and `high`."""
        if self.is_symmetric:
            return torch.maximum(-low / self.least, high / (self.top - self.least)).clamp(min=LEAST)
        return ((high.clamp(min=0) + self.offset) / self.top).clamp(min=LEAST)


@dataclass(frozen=True)
class Networks:
    """The tensors of L networks, f32; in a program, nodes that read them.

    start: [1], the first time. waves: [32, 1], frequencies in radians for each unit of time. w1 .. w3: [L, 64, 64],
    b1 .. b3: [L, 64, 1], w4: [L, 1, 64], b4: [L, 1, 1]. The others are [L, 1]. unit: what the steps of an input are
    measured in. offset: how far below zero its grid reaches. least, most: between which its zero point lies.
    """

    start: Any
    waves: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    w3: Any
    b3: Any
    w4: Any
    b4: Any
    unit: Any
    offset: Any
    least: Any
    most: Any

    def map(self, function: Callable[[Any], Any]) -> Networks:
        """Each tensor by a function."""
        return Networks(*(function(value) for value in self.tensors().values()))

    def tensors(self) -> dict[str, Any]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def weights(self) -> list[Tensor]:
        """What is learned."""
        return [getattr(self, f"{kind}{layer}") for layer in (1, 2, 3, 4) for kind in "wb"]


@row_kind
@dataclass(frozen=True)
class TimeScales(Row):
    """Networks that give the steps of inputs at any time, beside the rows [T] that they gave for the schedule.

    `networks` names their tensors; `scales` and `zero_points` the tensors of rows, one of each for a network.
    """

    table: ClassVar[str] = "time-scales"
    of_node: ClassVar[bool] = False
    durable: ClassVar[bool] = True
    networks: Mapping[str, str]
    scales: tuple[str, ...]
    zero_points: tuple[str, ...]

    def tensors(self) -> tuple[str, ...]:
        return (*self.networks.values(), *self.scales, *self.zero_points)


def eager(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operation at once."""
    return operation(*args, **kwargs)


def steps_at(call: Call, time: Any, its: Networks) -> Any:
    """Steps [L, B] at times [B], in the dtype of both."""
    angles = call(aten.mul.Tensor, its.waves, call(aten.sub.Tensor, time, its.start))
    hidden = call(aten.cat.default, [call(aten.cos.default, angles), call(aten.sin.default, angles)])
    for weight, bias in ((its.w1, its.b1), (its.w2, its.b2), (its.w3, its.b3)):
        hidden = call(aten.relu.default, call(aten.add.Tensor, call(aten.matmul.default, weight, hidden), bias))
    last = call(aten.add.Tensor, call(aten.matmul.default, its.w4, hidden), its.b4)
    return call(aten.mul.Tensor, call(aten.squeeze.dim, call(aten.softplus.default, last), 1), its.unit)


def parameters_at(call: Call, time: Any, its: Networks) -> tuple[Any, Any]:
    """Scales f32 and zero points i32, both [L, B], at times [B].

    The networks are computed in f64 and rounded once, so that the order of sums, which depends on B, is not seen.
    """
    wide = its.map(lambda tensor: call(aten._to_copy.default, tensor, dtype=torch.float64))
    steps = steps_at(call, call(aten._to_copy.default, time, dtype=torch.float64), wide)
    scale = call(aten.clamp.default, call(aten._to_copy.default, steps, dtype=torch.float32), LEAST)
    zero = call(aten.round.default, call(aten.mul.Tensor, call(aten.reciprocal.default, scale), its.offset))
    zero = call(aten.maximum.default, call(aten.minimum.default, zero, its.most), its.least)
    return scale, call(aten._to_copy.default, zero, dtype=torch.int32)


def rows(its: Networks, timesteps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scales f32 and zero points i32, both [L, T], of any schedule: nothing is fitted again."""
    with torch.no_grad():
        return parameters_at(eager, torch.tensor(timesteps, dtype=torch.float32), its)


def untrained(first: Tensor, unit: Tensor, grids: Sequence[Codes], timesteps: Sequence[float], seed: int) -> Networks:
    """Networks that give the steps `first` [L] at all times, to be learned from there.

    The fastest wave turns by one radian from one of the times to the next, on average, so that times between two of
    them get steps between theirs. The paper's turns by one radian for each timestep of training.
    """
    count, generator = len(first), torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator, dtype=torch.float32) * 2 - 1) / math.sqrt(WIDTH)

    span = max(timesteps) - min(timesteps)
    fastest = (len(timesteps) - 1) / span if span else 1.0
    relative = (first / unit).double()
    column = {name: [getattr(grid, name) for grid in grids] for name in ("offset", "least", "most")}
    return Networks(
        start=torch.tensor([min(timesteps)], dtype=torch.float32),
        waves=(fastest * SLOWEST ** (torch.arange(WAVES, dtype=torch.float32) / (WAVES - 1)))[:, None],
        **{f"w{layer}": drawn(WIDTH, WIDTH) for layer in (1, 2, 3)},
        **{f"b{layer}": drawn(WIDTH, 1) for layer in (1, 2, 3)},
        w4=torch.zeros(count, 1, WIDTH, dtype=torch.float32),
        b4=(relative + (-torch.expm1(-relative)).log()).float()[:, None, None],  # log(e^s - 1)
        unit=unit[:, None],
        **{name: torch.tensor(values, dtype=torch.float32)[:, None] for name, values in column.items()},
    )
