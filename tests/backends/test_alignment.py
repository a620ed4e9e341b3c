"""Results do not depend on where operands lie in memory, under what `tests/conftest.py` asks of MKL.

Without it they do, on CPUs for which MKL takes kernels that begin at a boundary: the last bits of a product of floats
differ, a code flips, and at 4 bits that is percents of an output. `MKL_ENABLE_INSTRUCTIONS=SSE4_2` shows it anywhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.backends.conformance import compile_for
from tests.helpers import first
from tests.subjects import Subjects
from tfqc.driver import load

LINE = 64  # bytes


def away(values: Tensor, by: int) -> Tensor:
    """The same values, `by` bytes behind the beginning of a cache line."""
    room = torch.empty(values.numel() * values.element_size() + 2 * LINE, dtype=torch.uint8)
    begin = -room.data_ptr() % LINE + by
    piece = room[begin : begin + values.numel() * values.element_size()].view(values.dtype)
    return piece.copy_(values.detach().flatten()).view(values.shape)


def moved(model: nn.Module, by: int) -> None:
    """Put all weights and tables of a model there."""
    for module in model.modules():
        for name, value in module._buffers.items():
            assert value is not None
            if by % value.element_size() == 0:
                module._buffers[name] = away(value, by)


@pytest.mark.parametrize("by", [4, 8, 16, 32, 60])
def test_a_loaded_model(by: int, subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    program, artifact = compile_for(its, "fake-quant{weights=4 activations=none}", "fold", tmp_path)
    loaded = load(artifact.save(tmp_path / "out"))
    for timesteps in ([750.0], [33.0], [0.0, 250.0]):
        call = its.call(timesteps)
        with torch.no_grad():
            want = first(program(**call))
            for weights, inputs in ((0, by), (by, 0), (by, by)):
                moved(loaded, weights)
                there = {k: away(v, inputs) if v.is_floating_point() else v for k, v in call.items()}
                assert torch.equal(first(loaded(**there)), want), (timesteps, weights, inputs)


@pytest.mark.parametrize("by", [4, 8, 16, 32, 60])
@pytest.mark.parametrize("m, k, n", [(1, 32, 64), (1, 320, 1280), (2, 128, 32), (7, 37, 50), (64, 64, 64)])
def test_a_product(m: int, k: int, n: int, by: int) -> None:
    x, w = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for shape in ((m, k), (n, k)))
    want = away(x, 0) @ away(w, 0).T
    for x_by, w_by in ((0, by), (by, 0), (by, by)):
        assert torch.equal(away(x, x_by) @ away(w, w_by).T, want)
