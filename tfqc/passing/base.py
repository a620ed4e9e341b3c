"""What a pass is: a frozen dataclass whose fields are its options, and class attributes that say what it does.

A pass declares what it needs and gives; the pass manager (`tfqc.passing.pipeline`) holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfqc.ir.program import Program, Stage
from tfqc.ir.tables import Fact, Row
from tfqc.passing.context import Context
from tfqc.passing.spec import to_text

ALL_TABLES = frozenset({Row})


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

    `requires` and `provides` hold row classes, and columns of them: `Disturbance.column("cache4")`.
    """

    needs: Stage
    below: Stage | None
    requires: frozenset[Fact]
    provides: frozenset[Fact]
    preserves: frozenset[type[Row]]
    reaches: Stage
    data: frozenset[str]


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    Class attributes:
        name: kebab-case, the name in pipelines.
        needs: the stage that the program must have reached.
        below: the stage that it must not have reached yet (a pass on whole models cannot run on folded ones).
        requires, provides: row classes of side tables. A table is never a pass: any pass may provide it.
        preserves: derived tables that stay valid; `ALL_TABLES` for a pass that only adds. Durable ones always stay.
        reaches: the stage that the program has afterwards, if higher.
        numerics: what it may do to outputs; the numerics instrument checks it.
        data: what it needs from outside: `schedule`; `sampler`, a schedule that can sample; `calibration`; `weights`,
            a program that was captured with them.
    """

    name: ClassVar[str]
    needs: ClassVar[Stage] = Stage.CAPTURED
    below: ClassVar[Stage | None] = None
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    preserves: ClassVar[frozenset[type[Row]]] = ALL_TABLES
    reaches: ClassVar[Stage] = Stage.CAPTURED
    numerics: ClassVar[Numerics] = EXACT
    data: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program, ctx: Context) -> None:
        """Change the program in place. Raise `PassError` for what the user must mend."""
        raise TypeError(f"{type(self).__name__} defines no run().")

    def moves(self, program: Program) -> Numerics:
        """What it may do to the outputs of this program; `numerics` unless a pass knows better."""
        return self.numerics

    def draws_on(self, program: Program) -> frozenset[str]:
        """What it needs from outside for this program, as it is before a pipeline; what its contract says unless a pass
        knows better."""
        return self.contract().data

    def contract(self) -> Contract:
        """What it needs and gives with these options; the class attributes unless a pass knows better."""
        return Contract(
            self.needs, self.below, self.requires, self.provides, self.preserves, self.reaches, self.data
        )  # fmt: skip

    def __str__(self) -> str:
        return to_text(self.name, self)
