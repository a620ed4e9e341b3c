"""Loading an emitted `model.py`, whichever backend wrote it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import torch

from tfqc.errors import ArtifactError


def load_model(directory: Path) -> torch.nn.Module:
    """Import `model.py` under a name of its own and build its model from the tensors beside it.

    Raises:
        ArtifactError: the file cannot be imported.
    """
    path = directory / "model.py"
    name = f"tfqc_artifact_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArtifactError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # an artifact holds what its manifest lists, and nothing else
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module.load(directory)
