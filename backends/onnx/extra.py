"""What writing and running ONNX needs beside tfqc, imported when it is needed."""

from __future__ import annotations

import importlib
from typing import Any

from tfqc.errors import TfqcError


def needed(name: str) -> Any:
    """A module of the extra `onnx`.

    Raises:
        TfqcError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise TfqcError(f"The target onnx needs {package}, which is not there: pip install 'tfqc[onnx]'.") from error
