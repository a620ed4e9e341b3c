"""Targets: what hardware and user allow, in the grammar of passes: `fake-quant{weights=4 activations=8}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfqc.codegen.backend import Backend
from tfqc.codegen.known import find_backend
from tfqc.errors import SpecError
from tfqc.passing.spec import build, parse_specs, to_text


@dataclass(frozen=True)
class Target:
    """A backend's name, and its options as the backend's own frozen dataclass."""

    name: str
    options: Any

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `name{option=value}`.

        Raises:
            SpecError: malformed text, an unknown backend or option (with a suggestion), a value out of range.
        """
        specs = parse_specs(text)
        if len(specs) != 1:
            raise SpecError(f"A target is one name with options, not {text[:80]!r}.")
        backend = find_backend(specs[0].name)
        return cls(specs[0].name, build(backend.options, specs[0], "target"))

    @property
    def backend(self) -> Backend:
        """The backend, made anew."""
        return find_backend(self.name)()

    def __str__(self) -> str:
        return to_text(self.name, self.options)
