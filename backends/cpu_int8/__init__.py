"""cpu-int8: integer products and what lies between them as C++ kernels for x86 CPUs."""
