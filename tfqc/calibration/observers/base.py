"""What an observer is: statistics of one value, gathered a batch of images at a time.

Each batch has an observer of its own (`fresh`), and those of all batches are merged in the order of batches. Sums
depend on the order in which they are taken, so it is this that makes results the same bytes wherever batches ran.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from torch import Tensor

R_co = TypeVar("R_co", covariant=True)


class State(NamedTuple):
    """All that an observer knows: tensors, and facts that JSON holds."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Observer(ABC, Generic[R_co]):
    """Statistics of one value over the steps of a schedule.

    Attributes:
        kind: its name, one for each class.
        steps: positions in the schedule that it looks at; None is all of them.
    """

    kind: ClassVar[str]
    steps: frozenset[int] | None = None

    @property
    def key(self) -> str:
        """Kind and options as text: observers of one value with one key see the same."""
        return json.dumps({"kind": self.kind, **self.options()}, sort_keys=True)

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What its constructor takes by keyword, as JSON; not the batch."""

    @abstractmethod
    def fresh(self, batch: int) -> Self:
        """One with the same options that has seen nothing, for the batch of this number."""

    @abstractmethod
    def update(self, value: Tensor, step: int) -> None:
        """Take in the value at a position of the schedule.

        Raises:
            CalibrationError: it is NaN or infinite, where the statistics could not bear that.
        """

    @abstractmethod
    def merge(self, other: Observer[Any]) -> None:
        """Take in what an observer of the same class and options has seen of a later batch."""

    @abstractmethod
    def finish(self) -> R_co:
        """The result; nothing is taken in after it."""

    @abstractmethod
    def unknown(self) -> R_co:
        """What stands for the result where nothing is measured."""

    @abstractmethod
    def state(self) -> State:
        """All it knows, to be saved or sent to another process."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: State) -> Self:
        """Inverse of `state`, to be finished or merged; batches that are still to come have observers of their own."""

    def bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.state().tensors.values())
