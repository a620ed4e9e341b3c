"""Passes and backends by name: a literal table of the built-in ones, and entry points of other packages.

Everything is loaded lazily: a broken plug-in fails only when it is asked for.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from tfqc.errors import SpecError, TfqcError, suggest

OWNER = "tfqc"
PASSES = {
    "normalize": "tfqc.passes.normalize:Normalize",
    "discover-tib": "tfqc.passes.discover_tib:DiscoverTib",
    "plan-quantization": "tfqc.passes.plan_quantization:PlanQuantization",
    "measure-disturbance": "tfqc.passes.measure_disturbance:MeasureDisturbance",
    "select-maintenance": "tfqc.passes.select_maintenance:SelectMaintenance",
    "split-low-rank": "tfqc.passes.split_low_rank:SplitLowRank",
    "split-concat": "tfqc.passes.split_concat:SplitConcat",
    "calibrate-weights": "tfqc.passes.calibrate_weights:CalibrateWeights",
    "calibrate-activations": "tfqc.passes.calibrate_activations:CalibrateActivations",
    "calibrate-finite-set": "tfqc.passes.calibrate_finite_set:CalibrateFiniteSet",
    "learn-time-scales": "tfqc.passes.learn_time_scales:LearnTimeScales",
    "reconstruct-tib": "tfqc.passes.reconstruct_tib:ReconstructTib",
    "reconstruct-blocks": "tfqc.passes.reconstruct_blocks:ReconstructBlocks",
    "reconstruct-weights": "tfqc.passes.reconstruct_weights:ReconstructWeights",
    "fold-cache": "tfqc.passes.fold_cache:FoldCache",
    "hoist-request": "tfqc.passes.hoist_request:HoistRequest",
    "insert-qdq": "tfqc.passes.insert_qdq:InsertQdq",
    "lower-int8": "tfqc.backends.cpu_int8.passes.lower_int8:LowerInt8",
    "lower-int4": "tfqc.backends.cuda_int4.passes.lower_int4:LowerInt4",
    "lower-attention": "tfqc.backends.cpu_int8.passes.lower_attention:LowerAttention",
    "fuse-low-rank": "tfqc.backends.cuda_int4.passes.fuse_low_rank:FuseLowRank",
    "fuse-epilogues": "tfqc.passes.fuse_epilogues:FuseEpilogues",
    "fuse-norms": "tfqc.backends.cpu_int8.passes.fuse_norms:FuseNorms",
    "fuse-quantize": "tfqc.passes.fuse_quantize:FuseQuantize",
    "channels-last": "tfqc.passes.channels_last:ChannelsLast",
    "half-precision": "tfqc.backends.cuda_int4.passes.half_precision:HalfPrecision",
    "narrow-residual": "tfqc.backends.cpu_int8.passes.narrow_residual:NarrowResidual",
    "prepack-weights": "tfqc.backends.cpu_int8.passes.prepack_weights:PrepackWeights",
    "plan-memory": "tfqc.backends.cpu_int8.passes.plan_memory:PlanMemory",
}
BACKENDS = {
    "fake-quant": "tfqc.backends.fake_quant.backend:FakeQuantBackend",
    "cuda-int4": "tfqc.backends.cuda_int4.backend:CudaInt4Backend",
    "onnx": "tfqc.backends.onnx.backend:OnnxBackend",
    "openvino": "tfqc.backends.openvino.backend:OpenVinoBackend",
    "cpu-int8": "tfqc.backends.cpu_int8.backend:CpuInt8Backend",
}
_KINDS = {"passes": "pass", "backends": "backend"}
# Whose modules are being imported (by this thread), the outermost first.
_loading: ContextVar[tuple[Entry, ...]] = ContextVar("_loading", default=())


@dataclass(frozen=True)
class Entry:
    """Where a pass or backend comes from: `owner` is the distribution, `path` is module:attribute."""

    name: str
    path: str
    owner: str = OWNER
    version: str = ""


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load the passes and backends of other packages, which register operations and tables when they are imported.

    Returns:
        A sentence for each that does not load.
    """
    broken: list[str] = []
    for group in _KINDS:
        for name, entry in entries(group).items():
            if entry.owner != OWNER:
                try:
                    load(group, name)
                except SpecError as error:
                    broken.append(str(error))
    return tuple(broken)


@functools.cache
def entries(group: str) -> dict[str, Entry]:
    """All entries of `passes` or `backends` by name; nothing is loaded.

    Raises:
        TfqcError: two packages claim one name.
    """
    builtin = PASSES if group == "passes" else BACKENDS
    found = {name: Entry(name, path) for name, path in builtin.items()}
    for point in metadata.entry_points(group=f"tfqc.{group}"):
        dist = point.dist
        entry = Entry(point.name, point.value, dist.name if dist else "unknown", dist.version if dist else "")
        if other := found.get(point.name):
            raise TfqcError(
                f"The {_KINDS[group]} {point.name!r} is claimed by {other.owner} ({other.path}) "
                f"and by {entry.owner} ({entry.path}): uninstall one of them."
            )
        found[point.name] = entry
    return found


def check_name(group: str, name: str, cls: type[Any]) -> None:
    """Text is made from a class's own name and read back by the registered one."""
    if (own := getattr(cls, "name", None)) != name:
        raise SpecError(f"The {_KINDS[group]} {name!r} is registered under that name, but calls itself {own!r}.")


def load(group: str, name: str) -> Any:
    """What the entry `name` of `passes` or `backends` refers to.

    Raises:
        SpecError: there is none (with a suggestion), or its package does not load.
    """
    known, kind = entries(group), _KINDS[group]
    if name not in known:
        raise SpecError(f"There is no {kind} {name!r}.{suggest(name, list(known))}")
    entry = known[name]
    outer = _loading.get()
    if entry in outer:
        needing = " -> ".join(repr(e.name) for e in (*outer[outer.index(entry) :], entry))
        raise SpecError(
            f"{needing} need each other while they are imported: look passes and backends up when they run."
        )
    token = _loading.set((*outer, entry))
    try:
        return metadata.EntryPoint(name, entry.path, f"tfqc.{group}").load()
    except Exception as error:
        reason = str(error) if isinstance(error, TfqcError) else f"{type(error).__name__}: {error}"
        raise SpecError(f"The {kind} {name!r} of {entry.owner} does not load: {reason}") from error
    finally:
        _loading.reset(token)
