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
        mode: of the activations, as `plan-quantization` has it.
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
    tuned = ("tib+tiar+fsc" if strategy == "select" else strategy).split("+")
    parts = ["normalize", "discover-tib"]
    if weights or activations:
        bits = f"weights={weights or 'none'} activations={activations or 'none'}"
        method = "mse" if reconstruct else "min-max"
        grouped = f" group={group} group-scope={group_scope}" if group else ""
        if "tib" in tuned:
            # TIAR searches ranges of channels. Per-step rows inside the block are what FSC is: without it, the block
            # has one range for all steps.
            weight = "method=mse" if "tiar" in tuned else f"method={method}{grouped}"
            its = "mode=per-step activation-method=fsc" if "fsc" in tuned else f"mode={_still(mode)}"
            parts.append(f"plan-quantization{{scope=tib {bits} {weight} {its}}}")
        edge = f" edges={edges}" if edges is not None else ""
        parts.append(f"plan-quantization{{{bits} mode={mode} method={method}{grouped}{edge}}}")
    if "fsc" in tuned and activations:
        parts.append("calibrate-finite-set")
    if "tiar" in tuned and weights:
        parts.append("reconstruct-tib")
    parts.append(f"measure-disturbance{{weights={weights or 8} activations={activations or 8}}}")
    if strategy == "select":
        parts.append("select-maintenance{strategy=auto candidates=tib,cache4,cache8}")
    else:
        parts.append(f"select-maintenance{{strategy={strategy.split('+')[0]}}}")
    if rank:
        parts.append(f"split-low-rank{{rank={rank}}}")
    if weights:
        parts += ["reconstruct-weights", "calibrate-weights"] if reconstruct else ["calibrate-weights"]
    if activations:
        parts.append("calibrate-activations")
    parts += [f"fold-cache{{policy={policy}}}", "hoist-request"]
    if weights or activations:
        parts.append("insert-qdq")
    return ",".join(parts)


def _still(mode: str) -> str:
    return "static" if mode == "per-step" else mode
