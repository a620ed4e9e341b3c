"""The cuda-int4 backend."""

from tfqc.backends.cuda_int4.backend import CudaInt4Backend

__all__ = ["CudaInt4Backend"]
