"""Compiled denoisers in diffusers' pipelines."""
