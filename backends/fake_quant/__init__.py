"""fake-quant: exact integer grids in floating point arithmetic; the oracle that real kernels are compared with."""

from tfqc.backends.fake_quant.backend import FakeQuantBackend

__all__ = ["FakeQuantBackend"]
