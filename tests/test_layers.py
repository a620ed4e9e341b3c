"""Layers beside linear and conv2d: every one runs on every backend, and is quantized, or named as what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfqc
from tfqc.models.spec import ModelSpec


class Layers(nn.Module):
    """Two layers, the time between them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.time = first, second, nn.Linear(1, 8)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.time((t[:, None] / 1000).to(x.dtype))
        shift = shift.reshape(-1, 8, *[1] * (x.dim() - 2)) if hasattr(self.first, "stride") else shift[:, None]
        return self.second(F.silu(self.first(x) + shift))


class Experts(nn.Module):
    """Each token through every expert, weighted by a gate: as layers, and as one tensor of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.matrices = nn.Parameter(torch.randn(4, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        one = torch.stack([expert(x) for expert in self.experts], 2)
        return ((one + torch.einsum("bsd,ndf->bsnf", x, self.matrices)) * share[..., None]).sum(2)


class Rotated(nn.Module):
    """Pairs along the width of an image turned as complex numbers: torch has them beside each other in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)
        self.turns = nn.Buffer(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(3, (-1, 2)))
        turned = pairs * torch.polar(torch.ones(4), self.turns[:, 0].float())
        return self.conv(torch.view_as_real(turned).flatten(3).to(x.dtype))


class Chosen(nn.Module):
    """What gives several values: the tokens that a gate chooses, in order, and how all are spread."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.last = nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).squeeze(-1).topk(3, 1)
        order, _ = chosen.sort(1)
        spread, mean = torch.var_mean(x.float(), 1, keepdim=True)
        largest = x.gather(1, order[..., None].expand(-1, -1, 8)).max(1, keepdim=True)
        return self.last(x * weight.sum(1)[:, None, None] + (mean + spread).to(x.dtype) + largest.values)


# name -> first layer, second layer, shape of the sample, operations that stay in floating point, quantized weights
CASES: dict[str, tuple[Any, Any, tuple[int, ...], set[str], int]] = {
    "conv1d": (lambda: nn.Conv1d(8, 8, 3, padding=1), lambda: nn.Conv1d(8, 8, 1), (2, 8, 16), set(), 2),
    "conv3d": (
        lambda: nn.Conv3d(4, 8, 3, padding=1), lambda: nn.Conv3d(8, 4, (3, 1, 1), padding=(1, 0, 0)), (2, 4, 4, 6, 6),
        set(), 2,
    ),
    "transposed 1d": (
        lambda: nn.Conv1d(8, 8, 3, 2, 1), lambda: nn.ConvTranspose1d(8, 8, 4, 2, 1), (2, 8, 16),
        {"aten.conv_transpose1d.default"}, 1,
    ),
    "transposed 2d": (
        lambda: nn.Conv2d(4, 8, 3, 2, 1), lambda: nn.ConvTranspose2d(8, 4, 4, 2, 1), (2, 4, 8, 8),
        {"aten.conv_transpose2d.input"}, 1,
    ),
    "transposed 3d": (
        lambda: nn.Conv3d(4, 8, 3, 2, 1), lambda: nn.ConvTranspose3d(8, 4, 4, 2, 1), (2, 4, 4, 6, 6),
        {"aten.conv_transpose3d.input"}, 1,
    ),
    "rms norm": (
        lambda: nn.Linear(8, 8), lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)), (2, 5, 8), set(), 2,
    ),
    "rotated": (lambda: nn.Conv2d(4, 8, 3, padding=1), Rotated, (2, 4, 8, 8), set(), 2),
    "chosen": (lambda: nn.Linear(8, 8), Chosen, (2, 5, 8), set(), 3),
    "experts": (lambda: nn.Linear(8, 8), Experts, (2, 5, 8), {"aten.einsum.default"}, 6),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Kernels for CUDA run with torch here")
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("fake-quant{weights=none activations=none}", torch.bfloat16), ("fake-quant", torch.float32),
        ("cpu-int8", torch.float32), ("cpu-int8", torch.bfloat16), ("cuda-int4{arch=sm_86 mode=w4a8}", torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_it_runs_and_is_quantized_or_named(case: str, target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first, second, shape, left, quantized = CASES[case]
    torch.manual_seed(0)
    model = Layers(first(), second()).to(dtype)
    x, t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor([750, 750])
    spec = ModelSpec(case, model, {"x": x, "t": t}, diffusers.DDIMScheduler())
    tfqc.compile(spec, target, steps=4, calibration=2).save(tmp_path / "out")
    got, want = tfqc.load(tmp_path / "out")(x, t), model(x, t)
    limit = 0.02 if "none" in target else 0.3
    assert got.dtype == dtype and float((got.float() - want.float()).norm() / want.float().norm()) < limit
    remarks = json.loads((tmp_path / "out" / "manifest.json").read_text())["remarks"]
    named = {r["numbers"]["operation"] for r in remarks if r["kind"] == "float-product"}
    assert named == left
    if "none" not in target:
        text = (tmp_path / "out" / "program.ir").read_text()
        counted = ("dequantize_weight", "unpack_tiles", *(("qlinear", "qconv") if "cuda" in target else ()))
        assert sum(text.count(f"= tfqc.{op}") for op in counted) == quantized


@pytest.mark.parametrize("target", ["fake-quant{weights=none activations=none}", "fake-quant", "cpu-int8"])
def test_tied_weights_are_one_tensor(target: str, tmp_path: Path) -> None:
    shared = nn.Linear(8, 8)
    model = Layers(nn.Linear(8, 8), nn.Sequential(shared, nn.SiLU(), shared, nn.SiLU(), nn.Linear(8, 8)))
    x, t = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([750, 750])
    spec = ModelSpec("tied", model, {"x": x, "t": t}, diffusers.DDIMScheduler())
    tfqc.compile(spec, target, steps=4, calibration=2).save(tmp_path / "out")
    got = tfqc.load(tmp_path / "out")(x, t)
    assert float((got - model(x, t)).norm() / model(x, t).norm()) < (1e-5 if "none" in target else 0.15)
    text = (tmp_path / "out" / "program.ir").read_text()
    declared = [line for line in text.splitlines() if line.startswith("tensor")]
    suffix = {"cpu-int8": ".tiles:", "fake-quant": ".codes:"}.get(target, ".weight:")
    matrices = [line for line in declared if suffix in line and "second." in line]
    assert len(matrices) == 2, declared
