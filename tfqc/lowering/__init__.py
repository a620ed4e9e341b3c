"""What backends share where they lower programs to kernels."""
