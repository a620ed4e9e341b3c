"""fake-quant: exact integer grids in floating point arithmetic; the oracle that real kernels are compared with."""
