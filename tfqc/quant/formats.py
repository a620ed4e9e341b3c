"""What an operand is to be quantized to: number formats, and `QuantSpec`, which is text as passes are.

    int4{per=group group=64 range=mse by=plan-quantization why=edges=8}

An operand of a node has one spec, or several, each for a part of its channels or of the schedule's steps.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields
from typing import Literal

from tfqc.errors import SpecError, suggest
from tfqc.passing.spec import Spec, build, parse_specs, to_text
from tfqc.quant.grid import Grid, RangeMethod

Kind = Literal["integer", "float", "none"]
Part = tuple[int, int]
Specs = tuple["QuantSpec", ...]


@dataclass(frozen=True)
class Format:
    """A number format of `bits`. Kind `none` is no quantization: the operand stays in the model's floating point."""

    name: str
    bits: int
    kind: Kind

    @property
    def is_integer(self) -> bool:
        """True for integers of 2 to 8 bits, which grids (`tfqc.quant.grid`) are made of."""
        return self.kind == "integer"


FLOAT = Format("float", 32, "none")
# fp8 and fp4 (OCP 8-bit floating point; OCP microscaling formats) can be planned, and no pass quantizes to them yet.
FORMATS = {
    format.name: format
    for format in (
        *(Format(f"int{bits}", bits, "integer") for bits in range(2, 9)),
        Format("fp8-e4m3", 8, "float"),
        Format("fp8-e5m2", 8, "float"),
        Format("fp4-e2m1", 4, "float"),
        FLOAT,
    )
}


def integer(bits: int) -> Format:
    """The integer format of 2 to 8 bits."""
    return FORMATS[f"int{bits}"]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The options of a spec.

    per: what shares a scale: the whole tensor; a channel of the output; a `group` of so many columns of a weight's
    flattened row; a token, found at run time; a step of the schedule, which has `intervals` rows of scales, 0 = one for
    each step. symmetric: two's complement with zero point 0, else 0 .. 2^bits - 1. range: of the values that the grid
    spans: all (min-max), where the error is least (mse), all at each step (fsc, finite-set calibration), or what was
    learned as a function of time (tdq). smooth: a tensor of factors, one for each input channel, that the operand is
    divided by first. channels, steps: the part
    [start, stop) of the input channels, or of the steps of the schedule, that the spec is for; all without. by, why:
    who chose it, and for what reason.
    """

    per: Literal["tensor", "channel", "group", "token", "step"] = "tensor"
    group: int = 0
    intervals: int = 0
    symmetric: bool = True
    range: Literal["min-max", "mse", "fsc", "tdq"] = "min-max"
    smooth: str = ""
    channels: Part | None = None
    steps: Part | None = None
    by: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        if self.group < 0 or (self.per == "group") != bool(self.group):
            raise ValueError(
                f"group={self.group} with per={self.per}: per=group has the number of its columns, no other"
            )
        if self.intervals < 0 or (self.intervals and self.per != "step"):
            raise ValueError(f"intervals={self.intervals} with per={self.per}: rows of scales, 0 or more, of per=step")
        if self.range in ("fsc", "tdq") and self.per not in ("step", "tensor"):
            raise ValueError(f"range={self.range} with per={self.per}: finite sets have a scale for each step, or one")
        for what, part in (("channels", self.channels), ("steps", self.steps)):
            if part is not None and not 0 <= part[0] < part[1]:
                raise ValueError(f"{what}={part[0]},{part[1]}: a first one, and the one behind the last")


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Choices):
    """How one operand of one node, or a part of it, is quantized."""

    format: Format

    def __post_init__(self) -> None:
        super().__post_init__()
        said = {f.name for f in fields(Choices) if getattr(self, f.name) != f.default}
        if self.format.kind == "none" and (strange := sorted(said - {"channels", "steps", "by", "why"})):
            raise ValueError(f"what stays in floating point has no {strange[0]}")

    @property
    def is_quantized(self) -> bool:
        """False for an operand, or a part, that stays in floating point."""
        return self.format.kind != "none"

    @property
    def grid(self) -> Grid:
        """The integers of an integer format."""
        return Grid(self.format.bits, self.symmetric)

    @property
    def method(self) -> RangeMethod:
        """How a range is found in what was observed: finite sets take all of a step, as does what is not learned."""
        return "mse" if self.range == "mse" else "min-max"

    @property
    def how(self) -> str:
        """Ranges and scales in words, for reports."""
        groups = f" group {self.group}" if self.group else ""
        return f"{self.range}{groups}{'' if self.symmetric else ' asymmetric'}"

    def __str__(self) -> str:
        return to_text(self.format.name, Choices(**{f.name: getattr(self, f.name) for f in fields(Choices)}))


def spec_of(spec: Spec) -> QuantSpec:
    """A spec from its name and options.

    Raises:
        SpecError: there is no such format or option (with a suggestion), or a value is out of range.
    """
    if spec.name not in FORMATS:
        raise SpecError(f"There is no format {spec.name!r}.{suggest(spec.name, list(FORMATS))}")
    choices = build(Choices, spec, "format")
    try:
        return QuantSpec(format=FORMATS[spec.name], **vars(choices))
    except ValueError as error:
        raise SpecError(f"Format {spec.name!r}: {error}.") from error


def specs_to_text(specs: Specs) -> str:
    """The specs of an operand: `int8{per=step}`, or several with commas between them."""
    return ",".join(map(str, specs))


@functools.lru_cache(maxsize=65536)
def specs_of_text(text: str) -> Specs:
    """Inverse of `specs_to_text`.

    Raises:
        SpecError: malformed text, or what `spec_of` and `check_parts` refuse.
    """
    specs = tuple(map(spec_of, parse_specs(text)))
    check_parts(specs)
    return specs


def check_parts(specs: Specs) -> None:
    """Refuse specs of one operand that do not share it out: each part has one spec.

    Raises:
        SpecError: none, an overlap, or a gap between the parts.
    """
    if not specs:
        raise SpecError("An operand has no spec: say `float` for one that stays in floating point.")
    count = 1
    for what in ("channels", "steps"):
        parts = sorted({part for spec in specs if (part := getattr(spec, what)) is not None})
        if parts and any(getattr(spec, what) is None for spec in specs):
            raise SpecError(f"Of several specs of an operand all say their {what}, or none.")
        for before, after in itertools.pairwise(parts):
            if before[1] != after[0]:
                how = "overlap" if before[1] > after[0] else "leave a gap"
                raise SpecError(f"The {what} {_shown(before)} and {_shown(after)} of an operand {how}.")
        count *= max(len(parts), 1)
    if not len({(spec.channels, spec.steps) for spec in specs}) == len(specs) == count:
        raise SpecError(
            f"{len(specs)} specs of an operand do not share it out: each part of its channels and steps has one."
        )


def _shown(part: Part) -> str:
    return f"{part[0]},{part[1]}"
