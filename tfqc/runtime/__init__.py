"""The run time of compiled models: all that an artifact's own code imports, with torch, safetensors and numpy."""

from tfqc.runtime.stepper import Output, Plan, Stepper, Table, buffer_name, encode_row

VERSION = 1  # of what emitted code imports from here; an artifact's manifest says which it needs

__all__ = ["VERSION", "Output", "Plan", "Stepper", "Table", "buffer_name", "encode_row"]
