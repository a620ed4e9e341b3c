"""Passes that run behind a user's pipeline: from explicit quantization to kernels."""

from __future__ import annotations

from tfqc.passing import Pass
from tfqc.passing.pipeline import Pipeline


def legalize() -> tuple[Pass, ...]:
    """Lower, fuse, and compute the rest in f16."""
    return Pipeline.parse(
        "lower-int4,fuse-low-rank,fuse-epilogues{gates=false},channels-last,fuse-quantize{rows=true},half-precision"
    ).passes
