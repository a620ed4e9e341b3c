"""Values that are no real numbers: positions, truths, complex numbers, as outputs and as temporal features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tfqc

TIMES = (421.0, 7.0)


class Denoiser(nn.Module):
    """Two layers of a sequence [B, 5, 8], and rows of time between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.first, self.last = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return (self.last(self.between(self.first(sample), self.time(timestep[:, None].float() / 1000))),)

    def between(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + shift[:, None]


class Outputs(Denoiser):
    """The sample, which is largest, whether it is positive, and both halves as complex numbers."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        (x,) = super().forward(sample, timestep)
        return x, x.topk(1).indices, x > 0, torch.complex(x[..., :4], x[..., 4:])


class Turns(Denoiser):
    """Pairs turned by angles that time gives: the feature is complex."""

    def between(self, x: Tensor, shift: Tensor) -> Tensor:
        turns = torch.polar(torch.ones_like(shift[:, :4]), shift[:, :4])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turns[:, None]).flatten(-2)


class Reorders(Denoiser):
    """Channels in an order that time gives, doubled where a truth says so."""

    def between(self, x: Tensor, shift: Tensor) -> Tensor:
        x = x.gather(-1, shift.argsort(-1)[:, None].expand(x.shape)) + shift[:, None]
        return torch.where((shift > 0)[:, None], x, 2 * x)


class Returns(Denoiser):
    """Its input, too."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return *super().forward(sample, timestep), sample, timestep


class Filters(Denoiser):
    """High frequencies along the sequence are halved."""

    def between(self, x: Tensor, shift: Tensor) -> Tensor:
        waves = torch.fft.fft(x + shift[:, None], dim=1)
        return torch.fft.ifft(waves * torch.tensor([1, 1, 0.5, 0.5, 1])[:, None], dim=1).real


def compiled(model: nn.Module, target: str, where: Path, strategy: str = "fold") -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    calls = [{"sample": torch.randn(16, 5, 8, generator=generator), "timestep": torch.full((16,), t)} for t in TIMES]
    artifact = tfqc.compile(
        model.eval().requires_grad_(False), target=target, schedule=TIMES, strategy=strategy, calibration=calls,
        example_inputs={"sample": torch.randn(2, 5, 8), "timestep": torch.tensor(TIMES)},
    )  # fmt: skip
    return tfqc.load(artifact.save(where))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.filterwarnings("ignore:Kernels for CUDA run with torch here")
@pytest.mark.parametrize(
    "target", ["fake-quant", "cpu-int8", "cuda-int4{arch=sm_86 mode=w4a8 edges=none}", "onnx", "openvino"]
)
def test_outputs_are_of_the_kind_that_they_were(target: str, tmp_path: Path) -> None:
    if target in ("onnx", "openvino"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(target, target))
    model = Outputs()
    loaded = compiled(model, target, tmp_path / "out")
    for images, t in ((2, 7.0), (3, 421.0)):
        call = torch.randn(images, 5, 8, generator=torch.Generator().manual_seed(images)), torch.full((images,), t)
        found, wanted = loaded(*call), model(*call)
        assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in wanted]
        assert error(found[0], wanted[0]) < 0.2 and error(found[3], wanted[3]) < 0.2
        assert torch.equal(found[3], torch.complex(found[0][..., :4], found[0][..., 4:]))
        assert torch.equal(found[1], found[0].topk(1).indices) and torch.equal(found[2], found[0] > 0)
    call[0][1, 0, 0] = float("nan")
    assert loaded(*call)[3].isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("target", ["fake-quant", "cpu-int8", "onnx", "openvino"])
def test_an_input_that_is_returned(target: str, tmp_path: Path) -> None:
    if target in ("onnx", "openvino"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(target, target))
    loaded = compiled(Returns(), target, tmp_path / "out")
    call = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 7.0)
    _, sample, timestep = loaded(*call)
    assert torch.equal(sample, call[0]) and torch.equal(timestep, call[1])


@pytest.mark.parametrize("strategy", ["fold", "cache8", "cache4", "select"])
@pytest.mark.parametrize("model", [Turns, Reorders])
def test_features_of_time(model: type[Denoiser], strategy: str, tmp_path: Path) -> None:
    its = model()
    loaded = compiled(its, "fake-quant", tmp_path / "out", strategy)
    for t in TIMES:
        call = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2)), torch.full((3,), t)
        assert error(loaded(*call)[0], its(*call)[0]) < 0.1


@pytest.mark.parametrize("target", ["fake-quant", "cpu-int8", "onnx", "openvino"])
def test_fourier_transforms(target: str, tmp_path: Path) -> None:
    if target in ("onnx", "openvino"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(target, target))
    its = Filters()
    if target == "openvino":
        with pytest.raises(tfqc.TfqcError, match="OpenVINO computes other Fourier transforms than torch: take onnx"):
            compiled(its, target, tmp_path / "out")
        return
    call = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2)), torch.full((3,), 7.0)
    assert error(compiled(its, target, tmp_path / "out")(*call)[0], its(*call)[0]) < 0.1
