"""Any example batch is captured as any other, whatever other sizes the model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfqc
from tfqc.frontend import capture
from tfqc.ir.types import symbols_of
from tfqc.models.spec import ModelSpec


class Tokens(nn.Module):
    """Two tokens of six channels, attention over them, a time MLP, and a table with a row for each token."""

    count = 2

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 6))
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, sample: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        hidden = sample + self.time(timestep[:, None].float() / 1000)[:, None] + ids
        q, k, v = self.qkv(hidden).reshape(sample.shape[0], -1, 3, 3, 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return sample + self.out(mixed)

    def example(self, batch: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, self.count, 6), "timestep": torch.arange(batch) * 250,
            "ids": torch.randn(self.count, 6),
        }  # fmt: skip


class MoreTokens(Tokens):
    count = 4


class Channels(nn.Module):
    """Images of three channels, and a convolution to as many."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 3)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep[:, None].float() / 1000)
        return self.last(F.silu(self.first(sample + shift[:, :, None, None])))

    def example(self, batch: int) -> dict[str, Any]:
        return {"sample": torch.randn(batch, 3, 8, 8), "timestep": torch.arange(batch) * 250}


class Frames(Channels):
    """Four frames an image, folded into the batch for the convolutions."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        folded = sample.reshape(-1, *sample.shape[2:])
        shift = self.time(timestep[:, None].float() / 1000).repeat_interleave(4, 0)
        hidden = self.last(F.silu(self.first(folded) + F.pad(shift, (0, 5))[:, :, None, None]))
        return hidden.reshape(sample.shape)

    def example(self, batch: int) -> dict[str, Any]:
        return {"sample": torch.randn(batch, 4, 3, 8, 8), "timestep": torch.arange(batch) * 250}


class Together(nn.Module):
    """Attention of the images of a batch to each other: B x B scores, flattened on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.inner(sample) + torch.sin(timestep.float())[:, None]
        scores = (hidden @ sample.T).flatten().sigmoid().reshape(sample.shape[0], -1)
        return scores @ sample

    def example(self, batch: int) -> dict[str, Any]:
        return {"sample": torch.randn(batch, 6), "timestep": torch.arange(batch) * 250}


KINDS = [Tokens, MoreTokens, Channels, Frames, Together]


def made(kind: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def example(model: Any, batch: int) -> dict[str, Any]:
    """The same numbers for every model and batch, row by row."""
    torch.manual_seed(1)
    inputs = model.example(8)
    return {k: v[:batch] if k in ("sample", "timestep") else v for k, v in inputs.items()}


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_for_every_batch(kind: Callable[[], nn.Module], batch: int) -> None:
    model = made(kind)
    program = capture(model, example(model, batch))
    assert {s for t in program.types.values() for s in symbols_of(t)} == {"B"}
    assert [i.type.shape[0] for i in program.inputs] == [
        "B",
        "B",
        *([model.count] if isinstance(model, Tokens) else []),
    ]
    for called in (1, 2, 3, 4):
        call = example(model, called)
        torch.testing.assert_close(program(**call), model(**call))


def compiled(model: Any, target: str, batch: int, to: Path) -> Callable[..., Tensor]:
    spec = ModelSpec("a model", model, example(model, batch), diffusers.DDIMScheduler())
    tfqc.compile(spec, target, steps=4, calibration=4).save(to)
    return tfqc.load(to)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["fake-quant{weights=8 activations=8}", "cpu-int8"])
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 8])
def test_compiled_for_every_batch(kind: Callable[[], nn.Module], target: str, batch: int, tmp_path: Path) -> None:
    """What is compiled with one example is what is compiled with another."""
    model = made(kind)
    two, other = compiled(model, target, 2, tmp_path / "two"), compiled(model, target, batch, tmp_path / "other")
    for called in (1, 2, 3, 4):
        call = example(model, called)
        assert other(**call).shape == model(**call).shape
        torch.testing.assert_close(other(**call), two(**call))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8])
def test_unquantized_it_is_the_model(kind: Callable[[], nn.Module], batch: int, tmp_path: Path) -> None:
    model = made(kind)
    loaded = compiled(model, "fake-quant{weights=none activations=none}", batch, tmp_path / "out")
    for called in (1, 2, 3, 4):
        call = example(model, called)
        torch.testing.assert_close(loaded(**call), model(**call))
