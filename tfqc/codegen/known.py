"""Backends by name."""

from __future__ import annotations

import functools

from tfqc.codegen.backend import Backend
from tfqc.errors import SpecError
from tfqc.registry import check_name, entries, load


def backend_names() -> list[str]:
    """Names of all backends."""
    return list(entries("backends"))


@functools.cache
def find_backend(name: str) -> type[Backend]:
    """The class of a backend.

    Raises:
        SpecError: no such backend (with a suggestion), or its plug-in does not load.
    """
    cls = load("backends", name)
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise SpecError(f"Backend {name!r}: {cls!r} is no class derived from tfqc.codegen.backend.Backend.")
    check_name("backends", name, cls)
    return cls
