"""`tfqc env`: the machine and the versions, for reports of problems."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from tfqc.cli import options
from tfqc.cli.output import guarded, show

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "networkx")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
COMPILERS = ("g++", "nvcc")


@guarded
def env(as_json: options.AsJson = False) -> None:
    """Show versions, processor, memory and compilers."""
    import torch

    import tfqc
    from tfqc.report.tables import facts

    flags = _cpu("flags").split()
    value: dict[str, Any] = {
        "tfqc": tfqc.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": _cpu("model name") or platform.machine(),
        "cpu_flags": {flag: flag in flags for flag in FLAGS},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compilers": {name: shutil.which(name) for name in COMPILERS},
    }
    shown = {k: _words(v) for k, v in value.items()}
    show(value, facts(shown), as_json)


def _words(value: Any) -> str:
    """A value as a person would put it: what is there of a mapping, and what is not."""
    if isinstance(value, dict):
        return ", ".join(
            str(key) if item is True else f"no {key}" if not item else f"{key} ({item})" for key, item in value.items()
        )
    return "none" if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu(field: str) -> str:
    """A line of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
