"""select-maintenance: one strategy for each temporal feature, given or chosen by measured disturbance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tfqc.errors import PassError
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Disturbance, Maintenance, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.temporal.strategies import STRATEGIES


@dataclass(frozen=True)
class SelectMaintenance(Pass):
    """Decide how each temporal feature is kept.

    Options: strategy (one for all, or `auto`: the least disturbed); candidates, metric, granularity and budget apply to
    `auto`: from which strategies, by which error, decided for what, within how many bytes (none = no limit). A budget
    decides per feature: it starts from the cheapest candidates and buys the largest error reduction for a byte.
    """

    name: ClassVar[str] = "select-maintenance"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    provides: ClassVar[frozenset[Fact]] = frozenset({Maintenance})
    reaches: ClassVar[Stage] = Stage.ANALYZED

    strategy: Literal["auto", "tib", "cache4", "cache8", "table", "fold"] = "fold"
    candidates: tuple[str, ...] = ("tib", "cache4", "cache8", "fold")
    metric: Literal["cosine", "relative-l2"] = "cosine"
    granularity: Literal["feature-step", "feature", "step", "model"] = "feature"
    budget: int | None = None

    def __post_init__(self) -> None:
        if unknown := [s for s in self.candidates if s not in STRATEGIES]:
            raise ValueError(f"{unknown[0]!r} is no strategy: {', '.join(STRATEGIES)}")
        if not self.candidates:
            raise ValueError("candidates: at least one")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"budget={self.budget} is negative")
        if self.budget is not None and self.granularity != "feature":
            raise ValueError("a budget is spent per feature: granularity must be feature")

    def contract(self) -> Contract:
        """`auto` chooses among what was measured."""
        its = super().contract()
        if self.strategy != "auto":
            return its
        measured = {Disturbance.column(candidate) for candidate in self.candidates}
        return replace(its, requires=its.requires | {Disturbance} | measured)

    def run(self, program: Program, ctx: Context) -> None:
        """Provide `maintenance`."""
        features = [name for name, row in program.table(Tib).items() if row.part == "feature"]
        if self.strategy != "auto":
            chosen = {name: Maintenance((self.strategy,)) for name in features}
        else:
            chosen = self._choose(program, features)
        program.set_table(Maintenance, chosen)
        counts: dict[str, int] = {}
        for row in chosen.values():
            for strategy in set(row.strategy):
                counts[strategy] = counts.get(strategy, 0) + 1
        if counts:
            ctx.remark("maintenance", **counts)

    def _choose(self, program: Program, features: list[str]) -> dict[str, Maintenance]:
        disturbance = program.table(Disturbance)
        if lacking := [n for n in features if n not in disturbance]:
            raise PassError(
                f"The disturbance of {program.at(program.node(lacking[0]))} was not measured: put measure-disturbance "
                "behind discover-tib."
            )

        def errors(name: str, strategy: str) -> list[float]:
            row = disturbance[name]
            if self.metric == "cosine":
                return [1 - c for c in row.cosine[strategy]]
            return list(row.relative_l2[strategy])

        if not features:
            return {}
        steps = range(len(next(iter(disturbance.values())).timesteps))
        match self.granularity:
            case "feature" if self.budget is not None:
                return self._within_budget(disturbance, features, lambda n, s: sum(errors(n, s)))
            case "feature":
                return {n: Maintenance((self._best(lambda s, n=n: sum(errors(n, s))),)) for n in features}
            case "feature-step":
                table = {n: {s: errors(n, s) for s in self.candidates} for n in features}
                return {n: _row([self._best(lambda s, t=t, n=n: table[n][s][t]) for t in steps]) for n in features}
            case "step":
                table = {n: {s: errors(n, s) for s in self.candidates} for n in features}
                per_step = [self._best(lambda s, t=t: sum(table[n][s][t] for n in features)) for t in steps]
                return {n: _row(per_step) for n in features}
            case _:
                best = self._best(lambda s: sum(sum(errors(n, s)) for n in features))
                return {n: Maintenance((best,)) for n in features}

    def _best(self, error: Callable[[str], float]) -> str:
        """The candidate with the least error; of equals the later one, which stores more but computes less."""
        return min(reversed(self.candidates), key=error)

    def _within_budget(
        self, disturbance: dict[str, Disturbance], features: list[str], error: Callable[[str, str], float]
    ) -> dict[str, Maintenance]:
        cost = {(n, s): disturbance[n].bytes[s] for n in features for s in self.candidates}
        loss = {(n, s): error(n, s) for n in features for s in self.candidates}
        choice = {n: min(self.candidates, key=lambda s, n=n: (cost[n, s], loss[n, s])) for n in features}
        assert self.budget is not None
        spent = sum(cost[n, s] for n, s in choice.items())
        if spent > self.budget:
            raise PassError(
                f"The budget of {self.budget} bytes is too small: the cheapest candidates take {spent} bytes."
            )
        while True:
            upgrades = [
                ((loss[n, now] - loss[n, s]) / max(cost[n, s] - cost[n, now], 1), n, s)
                for n, now in choice.items()
                for s in self.candidates
                if loss[n, s] < loss[n, now] and spent + cost[n, s] - cost[n, now] <= self.budget
            ]
            if not upgrades:
                return {n: Maintenance((s,)) for n, s in choice.items()}
            _, name, strategy = max(upgrades)
            spent += cost[name, strategy] - cost[name, choice[name]]
            choice[name] = strategy


def _row(strategies: Sequence[str]) -> Maintenance:
    """One entry when all steps agree."""
    return Maintenance(tuple(strategies) if len(set(strategies)) > 1 else (strategies[0],))
