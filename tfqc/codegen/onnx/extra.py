"""What writing and running models of other engines needs beside tfqc, imported when it is needed."""

from __future__ import annotations

import importlib
from typing import Any

from tfqc.errors import TfqcError


def needed(name: str, extra: str = "onnx") -> Any:
    """A module of an extra of tfqc, which is called as the target that needs it.

    Raises:
        TfqcError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise TfqcError(
            f"The target {extra} needs {package}, which is not there: pip install 'tfqc[{extra}]'."
        ) from error
