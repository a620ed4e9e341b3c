"""Kernels of the cuda-int4 backend: 4-bit weights, 4- or 8-bit codes, exact s32 sums on tensor cores."""
