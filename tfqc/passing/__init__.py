"""Passes, what they declare, and pipelines of them."""

from tfqc.passing.base import EXACT, LOSSY, Contract, Numerics, Pass, close
from tfqc.passing.context import Context

__all__ = ["EXACT", "LOSSY", "Context", "Contract", "Numerics", "Pass", "close"]
