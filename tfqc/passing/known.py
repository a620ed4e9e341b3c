"""Passes by name."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from tfqc.errors import SpecError
from tfqc.passing.base import Pass
from tfqc.registry import check_name, entries, load


def pass_names() -> list[str]:
    """Names of all passes, the built-in ones first, in the order in which pipelines use them."""
    return list(entries("passes"))


@functools.cache
def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        SpecError: no such pass (with a suggestion), or its plug-in does not load.
    """
    cls = load("passes", name)
    # Asked of the class itself: a subclass that forgot the decorator inherits the answers of its base.
    parameters = getattr(cls, "__dict__", {}).get("__dataclass_params__")
    if not (isinstance(cls, type) and issubclass(cls, Pass) and parameters is not None and parameters.frozen):
        raise SpecError(f"Pass {name!r}: {cls!r} is no frozen dataclass derived from tfqc.passing.Pass.")
    check_name("passes", name, cls)
    return cls


def sound_passes() -> Iterator[tuple[str, type[Pass]]]:
    """All passes that load, by name: what advice and listings are made from."""
    for name in pass_names():
        try:
            yield name, find_pass(name)
        except SpecError:
            continue
