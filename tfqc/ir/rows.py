"""The core's own side tables: what the passes that ship with tfqc say about nodes to each other.

Durable are what the program means (where parameters get their rows, for which schedule) and what was measured before
anything was quantized. The others are derived from the program as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tfqc.ir.tables import Row, row_kind


@row_kind
@dataclass(frozen=True)
class BindingTime(Row):
    """When a value can be computed, by data flow (tfqc/README.md). Values without a row wait for the sample (dynamic).

    constant: at compile time; step-static: at compile time, a row for each timestep; request-static: once per image;
    request-step-static: once per image, a row for each timestep.
    """

    table: ClassVar[str] = "binding"
    inline: ClassVar[bool] = True
    time: str

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the inputs that the value depends on."""
        return next(roles for roles, time in BINDING_TIMES.items() if time == self.time)


BINDING_TIMES: dict[frozenset[str], str] = {
    frozenset(): "constant",
    frozenset({"time"}): "step-static",
    frozenset({"request"}): "request-static",
    frozenset({"time", "request"}): "request-step-static",
}


@row_kind
@dataclass(frozen=True)
class Tib(Row):
    """Part that a node plays in the temporal information block: `body`, or `feature` (read by dynamic nodes)."""

    table: ClassVar[str] = "tib"
    inline: ClassVar[bool] = True
    part: str


@row_kind
@dataclass(frozen=True)
class Disturbance(Row):
    """What each strategy does to one temporal feature, at each timestep of the schedule.

    `timesteps` [T]; `cosine`, `relative_l2` and `mismatch` map a strategy to T values: cos(e, ê), ‖ê − e‖ / ‖e‖ and
    δ = argmax_t' cos(e_t', ê_t) − t, in positions of the schedule. `bytes` is what the strategy would store.
    """

    table: ClassVar[str] = "disturbance"
    durable: ClassVar[bool] = True
    timesteps: tuple[float, ...]
    cosine: Mapping[str, tuple[float, ...]]
    relative_l2: Mapping[str, tuple[float, ...]]
    mismatch: Mapping[str, tuple[int, ...]]
    bytes: Mapping[str, int]

    def columns(self) -> tuple[str, ...]:
        """The strategies that were measured."""
        return tuple(self.cosine)


@row_kind
@dataclass(frozen=True)
class Trajectory(Row):
    """cos(x_t, x̂_t) along the sampler when only the TIB is quantized; keyed by strategy, in visiting order."""

    table: ClassVar[str] = "trajectory"
    of_node: ClassVar[bool] = False
    durable: ClassVar[bool] = True
    cosine: tuple[float, ...]


@row_kind
@dataclass(frozen=True)
class Maintenance(Row):
    """How a temporal feature is kept: one strategy for all steps, or one for each step of the schedule."""

    table: ClassVar[str] = "maintenance"
    inline: ClassVar[bool] = True
    strategy: tuple[str, ...]

    def at(self, step: int) -> str:
        """The strategy at a position of the schedule."""
        return self.strategy[step if len(self.strategy) > 1 else 0]

    @property
    def recomputes(self) -> bool:
        """True if the quantized TIB has to run at some step."""
        return "tib" in self.strategy


@row_kind
@dataclass(frozen=True)
class QuantPlan(Row):
    """What the operands of a node are to be quantized to, by the operand's name: `weight`, `input`.

    Specs are text, as `tfqc.quant.formats` reads it. An operand that is not named is not planned yet.
    """

    table: ClassVar[str] = "plan"
    durable: ClassVar[bool] = True
    operands: Mapping[str, str]


@row_kind
@dataclass(frozen=True)
class Quantizer(Row):
    """How one linear or convolution is quantized. Fields that name tensors are empty where nothing is quantized.

    Weight: `codes` int8, `weight_scale` and `weight_zero_point` [O, G], one for each `group` of the flattened row.
    Input: `input_scale` and `input_zero_point` [1] when static, [T] when per step; none when per token; codes from 0 to
    `input_top`, or to 2^bits - 1 where that is 0.
    `input_protected` bool [T, 1, ...] with the input's rank: where True, the input stays in floating point.
    """

    table: ClassVar[str] = "quantizer"
    weight_bits: int = 0
    codes: str = ""
    weight_scale: str = ""
    weight_zero_point: str = ""
    group: int = 0
    weight_how: str = ""
    input_bits: int = 0
    input_scale: str = ""
    input_zero_point: str = ""
    input_how: str = ""
    input_protected: str = ""
    input_top: int = 0

    def tensors(self) -> tuple[str, ...]:
        names = (
            self.codes,
            self.weight_scale,
            self.weight_zero_point,
            self.input_scale,
            self.input_zero_point,
            self.input_protected,
        )
        return tuple(n for n in names if n)


@row_kind
@dataclass(frozen=True)
class RowSource(Row):
    """Where a parameter of @step, or a tensor that is a table over the schedule, gets its rows.

    kind: `row` (the parameter is the row index; with a `label`, row * labels + label), `begin` / `time` (the parameter
    is output number `output` of that function; of `time`, stacked over the schedule), `table` (a tensor of compile-time
    rows of @time's output), `activation` (a tensor of quantizer parameters: an unknown timestep uses the nearest row).
    `encoding` of a table is `fp`, `int8` or `int4`; `scale` and `zero_point` name its tensors. `label` names the input
    of class labels for which a table has a row at every timestep, one for each value of the input's domain.
    """

    table: ClassVar[str] = "rows"
    of_node: ClassVar[bool] = False
    durable: ClassVar[bool] = True
    kind: str
    output: int = -1
    encoding: str = "fp"
    scale: str = ""
    zero_point: str = ""
    label: str = ""


@row_kind
@dataclass(frozen=True)
class Schedule(Row):
    """The schedule that a program is calibrated and folded for, under the key `schedule`.

    `timesteps` in the order in which the sampler visits them; `policy` for any other timestep: `recompute`,
    `nearest` or `error`; `sampler` is the scheduler's class name and configuration.
    """

    table: ClassVar[str] = "schedule"
    of_node: ClassVar[bool] = False
    durable: ClassVar[bool] = True
    timesteps: tuple[float, ...]
    policy: str = "recompute"
    sampler: Mapping[str, Any] = field(default_factory=dict[str, Any])


@row_kind
@dataclass(frozen=True)
class Memory(Row):
    """The buffer that a kernel writes a value to, and the positions in @step between which the value is needed."""

    table: ClassVar[str] = "memory"
    inline: ClassVar[bool] = True
    buffer: int
    first: int
    last: int
