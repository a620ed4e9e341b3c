"""A model whose code fixes the batch: images at several times in one call are right on every target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tfqc

TIMES = (421.0, 7.0)


class Pairs(nn.Module):
    """Two images, which see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.first, self.last = nn.Linear(1, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(sample) + self.time(timestep[:, None].float() / 1000)[:, None]
        return self.last(x + x.reshape(2, 5, 16).flip(0))


@pytest.mark.filterwarnings("ignore:Kernels for CUDA", "ignore:Pairs. 2 images are computed at once")
@pytest.mark.parametrize("target", ["fake-quant", "cpu-int8", "cuda-int4{mode=w4a8}"])
def test_two_times_in_a_call(target: str, tmp_path: Path) -> None:
    model = Pairs().eval().requires_grad_(False)
    call = {"sample": torch.randn(2, 5, 16), "timestep": torch.tensor(TIMES)}
    made = tfqc.compile(model, target, schedule=TIMES, calibration=[call], example_inputs=call)
    loaded = tfqc.load(made.save(tmp_path / "artifact"))
    for times in (TIMES, TIMES[::-1], TIMES[:1] * 2):
        t = torch.tensor(times)
        want, got = model(call["sample"], t), loaded(sample=call["sample"], timestep=t)
        got = got if isinstance(got, Tensor) else got[0]
        assert float((got - want).norm() / want.norm()) < (0.1 if "int4" in target else 0.03)
