"""The run time of compiled models: all that an artifact's own code imports, with torch, safetensors and numpy.

Nothing of the compiler is imported here. README.md beside this file says what is trusted.
"""

from tfqc.runtime.encoding import encode_row
from tfqc.runtime.files import VERSION
from tfqc.runtime.fixed import fixed_value
from tfqc.runtime.loading import load
from tfqc.runtime.outputs import Output
from tfqc.runtime.plan import Input, Plan, Table, UnknownTimestepWarning, buffer_name
from tfqc.runtime.stepper import Stepper

__all__ = [
    "VERSION",
    "Input",
    "Output",
    "Plan",
    "Stepper",
    "Table",
    "UnknownTimestepWarning",
    "buffer_name",
    "encode_row",
    "fixed_value",
    "load",
]
