"""The cpu-int8 backend."""

from tfqc.backends.cpu_int8.backend import CpuInt8Backend

__all__ = ["CpuInt8Backend"]
