"""Loading a model by running its artifact's own code: for artifacts of one's own (README.md beside this file)."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path

from tfqc.runtime.files import checked_manifest
from tfqc.runtime.origin import Origin
from tfqc.runtime.stepper import Stepper


def load(directory: str | Path, *, trust_code: bool = False, check_finite: bool = False) -> Stepper:
    """The model of an artifact, by importing the `model.py` in it. Nothing of the compiler is needed or imported.

    Args:
        trust_code: has to be True: the code in the directory runs with all that this process may do. `tfqc.load` needs
            no trust.
        check_finite: raise FloatingPointError at the first NaN or infinity, naming layer and step.

    Raises:
        ValueError: the code is not trusted, or the directory is no whole artifact (one sentence).
    """
    if trust_code is not True:
        raise ValueError(
            f"tfqc.runtime.load runs the code in {directory}: say trust_code=True if it is your own; tfqc.load takes "
            "the data alone and rebuilds the model."
        )
    directory = Path(directory).resolve()
    checked_manifest(directory)
    path = directory / "model.py"
    name = f"tfqc_artifact_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # an artifact holds what its manifest lists, and nothing else
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    model: Stepper = module.load(directory)
    model.reload = Origin.of(functools.partial(load, trust_code=True), directory)
    model.check_finite = check_finite
    return model
