"""What `tfqc gpu-check` does on a machine with a GPU: stored vectors, times of kernels, one step of an artifact."""
