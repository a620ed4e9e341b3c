"""What an instruction computes in each thread by itself: types and a function on arrays, without registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.ptx.errors import FaultError
from tests.ptx.scalars import DTYPES


@dataclass(frozen=True)
class Plan:
    """`compute` takes an array for each source and gives one for each result, of these PTX types."""

    results: tuple[str, ...]
    sources: tuple[str, ...]
    compute: Callable[..., Any]


class Mods:
    """The parts of an opcode behind its name, each to be taken exactly once."""

    def __init__(self, name: str, mods: tuple[str, ...]) -> None:
        self.name, self.rest = name, list(mods)

    def flag(self, name: str) -> bool:
        found = name in self.rest
        if found:
            self.rest.remove(name)
        return found

    def one_of(self, *names: str, default: str | None = None) -> str:
        """The first part if it is among the names."""
        if self.rest and self.rest[0] in names:
            return self.rest.pop(0)
        if default is None:
            self.unknown()
        return str(default)

    def kind(self, *kinds: str) -> str:
        """The next part, which must be one of these types, or any type."""
        return self.one_of(*(kinds or DTYPES))

    def done(self) -> None:
        if self.rest:
            self.unknown()

    def unknown(self) -> None:
        raise FaultError(f"unknown instruction: {self.name} with .{'.'.join(self.rest) or '(nothing)'}")


Factory = Callable[[Mods], Plan]
FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
FACTORIES: dict[tuple[str, bool], Factory] = {}


def operation(*names: str, floats: bool | None = None) -> Callable[[Factory], Factory]:
    """Registers what makes the plan of these instructions: those whose last type is a float, or is not, or all."""

    def register(factory: Factory) -> Factory:
        for name in names:
            for which in (False, True) if floats is None else (floats,):
                FACTORIES[name, which] = factory
        return factory

    return register


def plan(name: str, mods: tuple[str, ...]) -> Plan | None:
    """The plan of an instruction, or none if it is not one of this kind; raises for variants that are not known."""
    factory = FACTORIES.get((name, bool(mods) and mods[-1] in FLOATS))
    if factory is None:
        return None
    its = Mods(name, mods)
    result = factory(its)
    its.done()
    return result
