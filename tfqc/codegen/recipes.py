"""Pipelines by the name of a maintenance strategy: what the literature compares, as text that users can edit."""

from __future__ import annotations

from tfqc.errors import SpecError, suggest

# tib: the naive quantized block; fsc, tiar: kept by finite-set calibration and reconstruction; the rest as in
# `tfqc.temporal.strategies`; select: per feature the least disturbed of what `tib+tiar+fsc` and the caches give.
STRATEGIES = ("tib", "tib+fsc", "tib+tiar", "tib+tiar+fsc", "cache8", "cache4", "table", "fold", "select")


def quantization_pipeline(
    strategy: str,
    *,
    weights: int | None,
    activations: int | None,
    mode: str = "per-step",
    group: int | None = None,
    group_scope: str = "all",
    rank: int | None = None,
    edges: int | None = 8,
    policy: str = "recompute",
    reconstruct: bool = True,
) -> str:
    """Pipeline text from a captured program to explicit quantization.

    Args:
        strategy: one of `STRATEGIES`.
        weights, activations: bits, None = left in floating point.
        mode: of the activations, as `calibrate-activations` has it.
        edges: bits of the first and the last layer, weights and activations, where that is more; None = as the others.
        group: columns of a weight that share a scale, None = per channel.
        group_scope: `linear` leaves weights of larger windows per channel.
        rank: of the branch in f16 that takes a part of each linear's weight, None = no branch.
        policy: for timesteps that are not in the schedule, as `fold-cache` has it.
        reconstruct: search for good scales and codes (MSE, GPTQ); False takes min-max ranges, for which 8 bits do.

    Raises:
        SpecError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise SpecError(f"There is no strategy {strategy!r}.{suggest(strategy, list(STRATEGIES))}")
    keeps = {"tib+tiar+fsc"} if strategy == "select" else set(strategy.split("+"))
    parts = ["normalize", "discover-tib"]
    tuned = "+".join(keeps).split("+")
    if "fsc" in tuned and activations:
        parts.append(f"calibrate-finite-set{{bits={activations}}}")
    if "tiar" in tuned and weights:
        parts.append(f"reconstruct-tib{{bits={weights}}}")
    parts.append(f"measure-disturbance{{weights={weights or 8} activations={activations or 8}}}")
    if strategy == "select":
        parts.append("select-maintenance{strategy=auto candidates=tib,cache4,cache8}")
    else:
        parts.append(f"select-maintenance{{strategy={strategy.split('+')[0]}}}")
    if rank:
        parts.append(f"split-low-rank{{rank={rank}}}")
    if weights:
        shared = f"bits={weights} method={'mse' if reconstruct else 'min-max'}{_edge(edges, weights)}"
        grouped = f"{shared}{f' group={group}' if group else ''}"
        ways = [f"{grouped} scope=linear", shared] if group and group_scope == "linear" else [grouped]
        for name in ("reconstruct-weights", "calibrate-weights") if reconstruct else ("calibrate-weights",):
            parts += [f"{name}{{{way}}}" for way in ways]
    if activations:
        if strategy.startswith("tib") and "fsc" not in tuned and mode == "per-step":
            # Per-step rows inside the block are what FSC is: without it, the block has one range for all steps.
            parts.append(f"calibrate-activations{{bits={activations} scope=tib}}")
        parts.append(f"calibrate-activations{{bits={activations} mode={mode}{_edge(edges, activations)}}}")
    parts += [f"fold-cache{{policy={policy}}}", "hoist-request"]
    if weights or activations:
        parts.append("insert-qdq")
    return ",".join(parts)


def _edge(edges: int | None, bits: int) -> str:
    return f" edge-bits={edges}" if edges is not None and edges > bits else ""
