"""A libcuda that is none: `libcuda_stub.c`, built with gcc; its first lines say what the environment tells it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("libcuda_stub.c")


def build(folder: Path) -> Path:
    """The library."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    library = folder / "libcuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    return library


def tell(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """Set what the source calls TFQC_STUB_.., such as `fail="cuInit"`."""
    for name, value in settings.items():
        monkeypatch.setenv(f"TFQC_STUB_{name.upper()}", str(value))
