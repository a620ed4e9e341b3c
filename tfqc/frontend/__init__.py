"""The front end: a torch module and example inputs become a captured Program."""

from tfqc.frontend.capture import capture

__all__ = ["capture"]
