"""Optimizers for what is trained while a model is quantized."""

from tfqc.optim.stquant import STQuantAdam

__all__ = ["STQuantAdam"]
