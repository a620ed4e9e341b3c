"""What a pass is: a frozen dataclass whose fields are its options, and class attributes that say what it does.

A pass declares what it needs and gives; the pass manager (`tfqc.pipeline`) holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tfqc.calibration import Calibration
from tfqc.ir.program import Program, Stage
from tfqc.schedule import SamplingSchedule
from tfqc.spec import to_text

ALL_TABLES = frozenset({"*"})


@dataclass(frozen=True)
class Numerics:
    """How far a pass may move the program's outputs: `kind` is exact, close or lossy; `tolerance` is relative."""

    kind: str
    tolerance: float = 0.0


EXACT = Numerics("exact")
LOSSY = Numerics("lossy")


def close(tolerance: float) -> Numerics:
    """Outputs move by rounding alone: max |a − b| ≤ tolerance · max |a|."""
    return Numerics("close", tolerance)


@dataclass(frozen=True)
class Contract:
    """What a pass with certain options needs and gives; the fields are those of `Pass`.

    `requires` and `provides` name tables, and columns of tables where a pass needs some of them: `disturbance.cache4`.
    """

    needs: Stage
    below: Stage | None
    requires: frozenset[str]
    provides: frozenset[str]
    preserves: frozenset[str]
    reaches: Stage
    data: frozenset[str]


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    Class attributes:
        name: kebab-case, the name in pipelines.
        needs: the stage that the program must have reached.
        below: the stage that it must not have reached yet (a pass on whole models cannot run on folded ones).
        requires, provides: names of side tables. A table is never a pass: any pass may provide it.
        preserves: tables that stay valid; `ALL_TABLES` for a pass that only adds.
        reaches: the stage that the program has afterwards, if higher.
        numerics: what it may do to outputs; the numerics instrument checks it.
        data: what it needs from outside: `schedule`; `sampler`, a schedule that can sample; `calibration`; `weights`,
            a program that was captured with them.
    """

    name: ClassVar[str]
    needs: ClassVar[Stage] = Stage.CAPTURED
    below: ClassVar[Stage | None] = None
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[frozenset[str]] = ALL_TABLES
    reaches: ClassVar[Stage] = Stage.CAPTURED
    numerics: ClassVar[Numerics] = EXACT
    data: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program, ctx: Context) -> None:
        """Change the program in place. Raise `PassError` for what the user must mend."""
        raise TypeError(f"{type(self).__name__} defines no run().")

    def moves(self, program: Program) -> Numerics:
        """What it may do to the outputs of this program; `numerics` unless a pass knows better."""
        return self.numerics

    def contract(self) -> Contract:
        """What it needs and gives with these options; the class attributes unless a pass knows better."""
        return Contract(
            self.needs, self.below, self.requires, self.provides, self.preserves, self.reaches, self.data
        )  # fmt: skip

    def __str__(self) -> str:
        return to_text(self.name, self)


class Progress(Protocol):
    """Somebody who shows how far a long job is: says what, how far, and how long."""

    def track(self, items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        """Iterate over `items`, showing progress."""
        ...

    def say(self, text: str) -> None:
        """One line for the user."""
        ...


class Silent:
    """No progress is shown."""

    def track(self, items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        """Iterate over `items`."""
        del what, total
        yield from items

    def say(self, text: str) -> None:
        """Nothing is shown."""


@dataclass
class Context:
    """What passes may use beside the program.

    `report` collects lines that a pass wants the user to read (what was left in floating point, what was chosen).
    `rehearsal`: passes measure and train nothing; they write parameters of the right shapes, whose values mean nothing
    (`Pipeline.rehearse`).
    """

    schedule: SamplingSchedule | None = None
    calibration: Calibration | None = None
    seed: int = 0
    workdir: Path | None = None
    progress: Progress = field(default_factory=Silent)
    report: list[str] = field(default_factory=list[str])
    rehearsal: bool = False
