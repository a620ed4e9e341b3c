"""Temporal features: computing them, what quantization does to them, and how they are kept."""
