"""What an artifact's own code imports: the run time, and nothing of the compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import sys
import torch, safetensors.torch
before = set(sys.modules)
import {module}
new = sorted(m for m in set(sys.modules) - before)
print("\\n".join(new))
"""


@pytest.mark.parametrize(
    ("module", "ours", "most"),
    [
        ("tfqc.runtime", ("tfqc.runtime",), 20),
        ("tfqc.backends.cpu_int8.runtime.engine", ("tfqc.runtime", "tfqc.backends.cpu_int8.runtime"), 40),
        ("tfqc.backends.cuda_int4.runtime.engine", ("tfqc.runtime", "tfqc.backends.cuda_int4.runtime"), 40),
    ],
)
def test_modules_of_the_run_time(module: str, ours: tuple[str, ...], most: int) -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT.format(module=module)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    new = done.stdout.split()
    own = [m for m in new if m.startswith("tfqc")]
    packages = {"tfqc", "tfqc.errors", "tfqc.version", "tfqc.backends", *(p.removesuffix(".runtime") for p in ours)}
    strange = [m for m in own if m not in packages and not m.startswith(ours)]
    assert strange == []
    assert 0 < len(own) <= most
    outside = (
        {m.split(".")[0] for m in new} - {"tfqc"} - set(sys.stdlib_module_names) - {"torch", "numpy", "safetensors"}
    )
    assert outside == set()
