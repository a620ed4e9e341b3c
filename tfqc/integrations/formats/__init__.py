"""Checkpoints in formats that other tools read and write."""
