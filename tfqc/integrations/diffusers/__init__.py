"""Compiled and quantized denoisers in diffusers' pipelines."""

from __future__ import annotations

from tfqc.integrations.diffusers.mixin import TfqcConfig, register

__all__ = ["TfqcConfig", "register"]
