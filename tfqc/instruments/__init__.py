"""Instruments watch a pipeline run: they compose, and passes know none of them."""

from tfqc.instruments.bisect import Bisect, Culprit
from tfqc.instruments.dump import DumpIR, PrintIR
from tfqc.instruments.numerics import CheckNumerics
from tfqc.instruments.reproducer import Reproducer
from tfqc.instruments.timing import Timing
from tfqc.passing.instrument import Instrument, VerifyEach

__all__ = [
    "Bisect",
    "CheckNumerics",
    "Culprit",
    "DumpIR",
    "Instrument",
    "PrintIR",
    "Reproducer",
    "Timing",
    "VerifyEach",
]
