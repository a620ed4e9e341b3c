"""Tests of tfqc; the tree mirrors the one they test."""
