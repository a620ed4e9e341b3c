"""Classes of diffusers and transformers by name: files say which, and name nothing else."""

from __future__ import annotations

import importlib
from typing import Any

from tfqc.errors import ArtifactError


def full_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_of(name: str, *libraries: str) -> Any:
    """A class by its full name; nothing outside these libraries is imported.

    Raises:
        ArtifactError: it is of another library, or not there.
    """
    module, _, attribute = name.rpartition(".")
    library = module.partition(".")[0]
    if library not in libraries:
        raise ArtifactError(f"{name[:100]!a} is no class of {' or '.join(libraries)}.")
    found = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(found, type):
        raise ArtifactError(f"This {library} has no {name}.")
    return found
