"""How many bits each state of each layer has: raised and lowered one rung at a time, within a budget.

STQuant (arXiv 2604.06836) compares each layer's factors with averages over all, every K steps. Its thresholds are not
published; the ladder, the factors' product, the thresholds and the budget's rule are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RUNGS = (3, 4, 5, 6, 8)
FIRST = 4  # bits before anything is known
RAISED, LOWERED = 1.25, 0.8  # a need beyond these times the average one
KEPT = 0.9  # of an average over all layers, from one look to the next

State = tuple[int, str]  # the layer's number; "exp_avg" or "exp_avg_sq"


@dataclass(frozen=True)
class Factors:
    """What is seen of one layer.

    rms: of its gradient. dispersion: of its first moment, the mean over blocks of max |m| / rms(m), which says how much
    of a linear grid is empty. spread: of its second moment, the mean over blocks of log2(max v / min v), which says how
    far apart the values of a logarithmic grid are.
    """

    rms: float
    dispersion: float
    spread: float


@dataclass
class Allocation:
    """Bits of every state of every layer.

    values: of each layer, whole blocks. scales: bits of scales for a value of each kind of state. budget: bits of a
    value, the mean over all states, scales counted; with what is kept beside in 32 bits (`whole` values).
    """

    values: Sequence[int]
    scales: Mapping[str, float]
    budget: float
    whole: int = 0
    averages: dict[str, float] = field(default_factory=dict[str, float])
    bits: dict[State, int] = field(default_factory=dict[State, int])

    def __post_init__(self) -> None:
        self.bits = {(n, name): FIRST for n in range(len(self.values)) for name in self.scales} | self.bits

    def mean(self) -> float:
        """Bits of a value, as the budget counts them."""
        held = sum(self.values[n] * (bits + self.scales[name]) for (n, name), bits in self.bits.items())
        states = len(self.scales)
        return (held + 32 * states * self.whole) / max(states * (sum(self.values) + self.whole), 1)

    def look(self, seen: Mapping[int, Factors]) -> None:
        """Move states by one rung at most: up what needs more than the average, the neediest first and as far as the
        budget reaches; down what needs less."""
        if not seen:
            return
        self._average(seen)
        needs = {(n, name): need for n, its in seen.items() for name, need in self._needs(its).items()}
        for state in sorted(needs, key=needs.__getitem__):
            if needs[state] < LOWERED:
                self.bits[state] = RUNGS[max(RUNGS.index(self.bits[state]) - 1, 0)]
        for state in sorted(needs, key=needs.__getitem__, reverse=True):
            if needs[state] > RAISED:
                before = self.bits[state]
                self.bits[state] = RUNGS[min(RUNGS.index(before) + 1, len(RUNGS) - 1)]
                if self.mean() > self.budget:
                    self.bits[state] = before

    def _needs(self, its: Factors) -> dict[str, float]:
        size = its.rms / self.averages["rms"]
        return {
            "exp_avg": size * its.dispersion / self.averages["dispersion"],
            "exp_avg_sq": its.spread / self.averages["spread"],
        }

    def _average(self, seen: Mapping[int, Factors]) -> None:
        for name in ("rms", "dispersion", "spread"):
            weights = [self.values[n] for n in seen]
            now = sum(w * getattr(f, name) for w, f in zip(weights, seen.values(), strict=True)) / sum(weights)
            before = self.averages.get(name, now)
            self.averages[name] = max(KEPT * before + (1 - KEPT) * now, 1e-30)
