"""The run time of compiled models: all that an artifact's own code imports, with torch, safetensors and numpy."""

from tfqc.runtime.stepper import Output, Plan, Stepper, Table, buffer_name, encode_row

__all__ = ["Output", "Plan", "Stepper", "Table", "buffer_name", "encode_row"]
