"""Every dtype of torch in a model's buffers, and of its weights: taken all the way, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tfqc
from tfqc.errors import TfqcError
from tfqc.models.spec import ModelSpec

STORED = [
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip


class Scaled(nn.Module):
    """One layer, and a buffer that its result is multiplied by."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 1.0, 1.0, 4.0, 1.0]).to(dtype))
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = self.scale
        scale = torch.view_as_real(scale)[:, 0] if scale.is_complex() else scale.to(x.dtype)
        return self.inner(x) * scale + torch.sin(t.to(x.dtype))[:, None]


def spec(model: nn.Module, dtype: torch.dtype = torch.float32) -> ModelSpec:
    inputs = {"x": torch.linspace(-1, 1, 12, dtype=dtype).reshape(2, 6), "t": torch.tensor([750, 750])}
    return ModelSpec("a model", model, inputs, diffusers.DDIMScheduler())


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("target", ["fake-quant{weights=none activations=none}", "cpu-int8"])
def test_buffers_of_every_dtype(dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    model = spec(Scaled(dtype))
    tfqc.compile(model, target, steps=4, calibration=2).save(tmp_path / "out")
    got, want = tfqc.load(tmp_path / "out")(**model.example_inputs), model.model(**model.example_inputs)
    if "none" in target:
        torch.testing.assert_close(got, want)
    else:
        assert float((got - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("target", ["fake-quant{weights=8 activations=8}", "cpu-int8", "cuda-int4{arch=sm_86}"])
def test_weights_in_other_dtypes_are_refused(dtype: torch.dtype, target: str) -> None:
    with pytest.raises(TfqcError, match=r"Weight @inner.weight of %linear .* compiled from float32, .*model.float\(\)"):
        tfqc.compile(spec(Scaled(dtype).to(dtype), dtype), target, steps=4, calibration=2)


def test_what_no_file_holds_is_stored_as_pairs(tmp_path: Path) -> None:
    """Safetensors has no complex128: such a buffer is stored as real numbers, and is one again in the graph."""
    model = spec(Scaled(torch.complex128))
    artifact = tfqc.compile(model, "fake-quant{weights=none activations=none}", steps=4, calibration=2)
    artifact.save(tmp_path / "out")
    stored = [t for tensors in artifact.tensors.values() for t in tensors.values()]
    assert torch.float64 in {t.dtype for t in stored} and torch.complex128 not in {t.dtype for t in stored}
    got, want = tfqc.load(tmp_path / "out")(**model.example_inputs), model.model(**model.example_inputs)
    torch.testing.assert_close(got, want)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = Scaled(torch.float32)
    with pytest.raises(TfqcError, match="has no weights \\(it lies on the meta device\\)"):
        tfqc.compile(spec(model), steps=4, calibration=2)
