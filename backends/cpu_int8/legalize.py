"""Passes that run behind a user's pipeline: from explicit quantization to kernels."""

from __future__ import annotations

from typing import Any

from tfqc.passing import Pass
from tfqc.passing.pipeline import Pipeline


def legalize(options: Any) -> tuple[Pass, ...]:
    """Lower, fuse, and plan, as the target has it."""
    parts = [
        "lower-int8",
        f"lower-attention{{mode={options.attention}}}",
        "fuse-epilogues",
        "fuse-norms",
        "channels-last",
        "fuse-quantize",
        *(["narrow-residual"] if options.residual == "bf16" else []),
        f"prepack-weights{{bits={options.weights}}}",
        "plan-memory",
    ]
    return Pipeline.parse(",".join(parts)).passes
