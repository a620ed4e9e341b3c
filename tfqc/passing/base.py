"""What a pass is: a frozen dataclass whose fields are its options, and class attributes that say what it does.

A pass declares what it needs and gives; the pass manager (`tfqc.passing.pipeline`) holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfqc.ir.program import Program, Stage
from tfqc.passing.context import Context
from tfqc.passing.spec import to_text

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
