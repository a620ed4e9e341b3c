"""The cuda-int4 backend keeps what all backends keep; without a device its lines run with torch, on the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.backends.conformance import Conformance, compile_for
from tests.backends.conformance import pytest_generate_tests as pytest_generate_tests
from tests.helpers import first
from tests.subjects import Subjects
from tfqc.backend import compromises
from tfqc.driver import load
from tfqc.ir.program import Program
from tfqc.target import Target

pytestmark = pytest.mark.filterwarnings("ignore:Kernels for CUDA")


class TestCudaInt4(Conformance):
    backend = "cuda-int4"
    targets = ("cuda-int4{arch=sm_86}", "cuda-int4{arch=sm_90a mode=w4a8 activations=per-token}")
    models: ClassVar = ("unet2d", "unet-sd", "unet-sdxl", "dit")
    modules = ("torch", "safetensors", "tfqc")

    def want(self, program: Program, call: dict[str, Any]) -> Tensor:
        """A batch of several timesteps as one batch for each: torch rounds f16 differently in batches of other sizes,
        and a code that flips moves these small random networks by far more than rounding."""
        timestep = call["timestep"]
        if timestep.dim() == 0:
            return first(program(**call))
        outs: dict[int, Tensor] = {}
        for t in timestep.unique():
            mine = (timestep == t).nonzero().flatten()
            for entry, out in zip(mine.tolist(), first(program(**_entries(call, mine))), strict=True):
                outs[entry] = out
        return torch.stack([outs[entry] for entry in range(len(timestep))])


def _entries(value: Any, which: Tensor) -> Any:
    if isinstance(value, dict):
        return {k: _entries(v, which) for k, v in value.items()}
    return value.index_select(0, which) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("target", ["cuda-int4{mode=w4a8 activations=static}", "cuda-int4{activations=per-token}"])
def test_other_targets(target: str, subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    program, artifact = compile_for(its, target, "fold", tmp_path / "work")
    loaded = load(artifact.save(tmp_path / "out"))
    with torch.no_grad():
        for t in ([750.0], [33.0]):
            assert torch.equal(first(program(**its.call(t))), first(loaded(**its.call(t))))


def test_what_torch_runs_says_why(subject: Subjects, tmp_path: Path) -> None:
    target = Target.parse("cuda-int4")
    program, _ = compile_for(subject("unet2d"), "cuda-int4", "fold", tmp_path)
    said = compromises(target.backend, program, target.options)
    assert len(said) == 2  # the first and the last layer
    assert all(text.endswith("runs in torch: its weight has more than 4 bits") for text in said)
