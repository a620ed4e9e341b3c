"""cuda-int4: weights of 4 bits on the tensor cores of NVIDIA GPUs."""
