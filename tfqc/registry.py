"""Passes and backends by name: a literal table of the built-in ones, and entry points of other packages.

Everything is loaded lazily: a broken plug-in fails only when it is asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from tfqc.errors import SpecError, TfqcError, suggest
from tfqc.passing import Pass, is_options_only

OWNER = "tfqc"
PASSES = {
    "normalize": "tfqc.passes.normalize:Normalize",
    "discover-tib": "tfqc.passes.discover_tib:DiscoverTib",
    "measure-disturbance": "tfqc.passes.measure_disturbance:MeasureDisturbance",
    "select-maintenance": "tfqc.passes.select_maintenance:SelectMaintenance",
    "calibrate-weights": "tfqc.passes.calibrate_weights:CalibrateWeights",
    "calibrate-activations": "tfqc.passes.calibrate_activations:CalibrateActivations",
    "calibrate-finite-set": "tfqc.passes.calibrate_finite_set:CalibrateFiniteSet",
    "reconstruct-tib": "tfqc.passes.reconstruct_tib:ReconstructTib",
    "fold-cache": "tfqc.passes.fold_cache:FoldCache",
    "hoist-request": "tfqc.passes.hoist_request:HoistRequest",
    "insert-qdq": "tfqc.passes.insert_qdq:InsertQdq",
}
BACKENDS = {
    "fake-quant": "tfqc.backends.fake_quant:FakeQuantBackend",
}


@dataclass(frozen=True)
class Entry:
    """Where a pass or backend comes from: `owner` is the distribution, `path` is module:attribute."""

    name: str
    path: str
    owner: str
    version: str = ""


@functools.cache
def entries(group: str) -> dict[str, Entry]:
    """All entries of `passes` or `backends`.

    Raises:
        TfqcError: two packages claim one name.
    """
    builtin = PASSES if group == "passes" else BACKENDS
    found = {name: Entry(name, path, OWNER) for name, path in builtin.items()}
    for point in metadata.entry_points(group=f"tfqc.{group}"):
        owner = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else ""
        if other := found.get(point.name):
            if (other.owner, other.path) == (owner, point.value):
                continue  # one distribution that stands twice on the path
            raise TfqcError(
                f"{group.removesuffix('es').removesuffix('s').capitalize()} {point.name!r} is claimed by "
                f"{other.owner} ({other.path}) and by {owner} ({point.value}): uninstall one of them."
            )
        found[point.name] = Entry(point.name, point.value, owner, version)
    return found


def pass_names() -> list[str]:
    """Names of all passes, the built-in ones first, in the order in which pipelines use them."""
    return list(entries("passes"))


def backend_names() -> list[str]:
    """Names of all backends."""
    return list(entries("backends"))


@functools.cache
def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        SpecError: no such pass (with a suggestion), or its plug-in does not load.
    """
    cls = _load("passes", "pass", name)
    if not (isinstance(cls, type) and issubclass(cls, Pass) and is_options_only(cls)):
        raise SpecError(f"Pass {name!r}: {cls!r} is no frozen dataclass derived from tfqc.passing.Pass.")
    if cls.name != name:
        raise SpecError(f"Pass {name!r} is registered under that name, but calls itself {cls.name!r}.")
    return cls


@functools.cache
def find_backend(name: str) -> Any:
    """The class of a backend.

    Raises:
        SpecError: no such backend (with a suggestion), or its plug-in does not load.
    """
    return _load("backends", "backend", name)


def _load(group: str, kind: str, name: str) -> Any:
    known = entries(group)
    if name not in known:
        raise SpecError(f"There is no {kind} {name!r}.{suggest(name, list(known))}")
    entry = known[name]
    module, _, attribute = entry.path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:
        raise SpecError(f"{kind.capitalize()} {name!r} of {entry.owner} does not load: {error}") from error
