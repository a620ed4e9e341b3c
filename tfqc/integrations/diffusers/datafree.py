"""Quantization without data: weights by their own ranges, activations by those that each token has at run time."""

from __future__ import annotations

import dataclasses
import typing

from tfqc.codegen.target import Target
from tfqc.errors import CalibrationError
from tfqc.passing.pipeline import Pipeline

_AT_RUN_TIME = "per-token"
_LEARNS = "reconstruct-weights"  # from activations; ranges that are found at run time draw on none


def without_data(target: Target, strategy: str) -> tuple[Target, Pipeline]:
    """The target with ranges that are found at run time, and its pipeline for a strategy, which draws on no data.

    Raises:
        CalibrationError: the target has no such ranges.
    """
    hints = typing.get_type_hints(type(target.options))
    option = next((name for name, hint in hints.items() if _AT_RUN_TIME in typing.get_args(hint)), None)
    if option is None:
        raise CalibrationError(
            f"{target.name} has no ranges of activations that are found at run time, so calibration='none' is not for "
            "it: give prompts."
        )
    target = Target(target.name, dataclasses.replace(target.options, **{option: _AT_RUN_TIME}))
    passes = Pipeline.parse(target.backend.pipeline(target.options, strategy)).passes
    return target, Pipeline(tuple(item for item in passes if item.name != _LEARNS))
