"""What is left in floating point is named; a target that asks for bits and gets none is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tfqc
from tests.tiny import tiny
from tfqc.analysis.left import check_quantized, left_in_floating_point
from tfqc.errors import TfqcError
from tfqc.models.spec import ModelSpec


class Left(nn.Module):
    """A layer, if asked for, beside one product that is in no form that is quantized."""

    def __init__(self, make: Callable[[], nn.Module], layer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.product = nn.Linear(1, 4), make()
        self.layer = nn.Conv2d(4, 4, 3, padding=1) if layer else nn.Identity()
        self.requires_grad_(False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep[:, None].float() / 1000)
        return self.product(self.layer(sample + shift[:, :, None, None]))


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x[0], x[0], self.w)[None] + torch.einsum("bchw,chv->bcwv", x, self.w)


class Experts(nn.Module):
    """A mixture of experts: a matrix for each."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x[0], self.w)[None]


class Scaled(nn.Module):
    """An addmm that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.w = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x.reshape(-1, 8), self.w, alpha=0.5).reshape(x.shape)


class Names(nn.Module):
    """A lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.names((x[:, 0] > 0).long()).movedim(-1, 1)


class Larger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :, ::2, ::2]


KINDS = {
    Batched: ["aten.baddbmm.default multiplies by @product.w", "aten.einsum.default multiplies by @product.w"],
    Experts: ["aten.bmm.default multiplies by @product.w in floating point: it multiplies by a matrix for each expert"],
    Scaled: ["aten.addmm.default multiplies by @product.w in floating point: it is no linear layer"],
    Names: ["aten.embedding.default looks up rows of @product.names.weight in floating point: a lookup multiplies"],
    Larger: ["aten.conv_transpose2d.input multiplies by @product.conv.weight"],
}


def spec(make: Callable[[], nn.Module], layer: bool) -> ModelSpec:
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([0, 250])}
    return ModelSpec("a model", Left(make, layer), inputs, diffusers.DDIMScheduler())


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("target", ["fake-quant{weights=8 activations=8}", "cpu-int8", "cuda-int4{arch=sm_86}"])
def test_products_that_stay_are_named(make: type[nn.Module], target: str) -> None:
    report = tfqc.compile(spec(make, True), target, steps=2, calibration=2).facts["report"]
    named = [line for line in report if "in floating point: " in line and "(product" in line]
    assert len(named) == len(KINDS[make])
    assert all(part in line.replace(".f16", "") for part, line in zip(KINDS[make], named, strict=True))


@pytest.mark.parametrize("make", [k for k in KINDS if k is not Names])
def test_a_target_that_quantizes_nothing_is_refused(make: type[nn.Module], tmp_path: Path) -> None:
    for target in ("fake-quant{weights=8 activations=8}", "fake-quant{weights=none activations=8}", "cpu-int8"):
        with pytest.raises(
            TfqcError, match=r"Nothing of a model was quantized: .*found: 1 aten.*nn.Linear or nn.Conv2d"
        ):
            tfqc.compile(spec(make, False), target, steps=2, calibration=2)
    asked = tfqc.compile(spec(make, False), "fake-quant{weights=none activations=none}", steps=2, calibration=2)
    assert any("multiplies by" in line for line in asked.facts["report"])


def test_only_passes_that_quantize_have_to_find_something() -> None:
    with pytest.raises(TfqcError, match=r"found: 2 aten.conv2d.default, 2 aten.linear.default"):
        check_quantized(tiny())
    target, pipeline = "fake-quant{weights=none activations=none}", "normalize,discover-tib"
    assert tfqc.compile(tiny(), target, pipeline=pipeline, schedule=[5.0, 2.0]).facts["report"]


def test_layers_are_not_named() -> None:
    assert left_in_floating_point(tiny()) == []


class Volume(nn.Module):
    """A convolution in three dimensions, padded by a word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None].expand(-1, -1, 3, -1, -1))[:, :, 1]


def test_a_convolution_in_three_dimensions_is_quantized() -> None:
    its = spec(Volume, False)
    artifact = tfqc.compile(its, "fake-quant{weights=8 activations=8}", steps=2, calibration=2)
    assert not [line for line in artifact.facts["report"] if "in floating point" in line]
    assert any(name.endswith("conv.weight.codes") for name in artifact.tensors["weights.safetensors"])
    report = tfqc.compile(its, "cpu-int8", steps=2, calibration=2).facts["report"]
    assert any("runs in torch: it is a convolution in three dimensions" in line for line in report)


class Joined(nn.Module):
    """A value beside itself, or beside one without channels, along channels."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.empty, self.conv = empty, nn.Conv2d(4 if empty else 8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x[:, :0], x] if self.empty else [x, x], 1))


@pytest.mark.filterwarnings("ignore:Kernels for CUDA run with torch here")
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("target", ["fake-quant{weights=8 activations=8}", "cpu-int8", "cuda-int4{mode=w4a8 edges=8}"])
def test_concatenations_of_odd_parts(target: str, empty: bool, tmp_path: Path) -> None:
    its = spec(lambda: Joined(empty), True)
    parsed = tfqc.Target.parse(target)
    for number, more in enumerate(("", "split-concat,")):
        recipe = parsed.backend.pipeline(parsed.options, "fold").replace("plan-quant", f"{more}plan-quant", 1)
        artifact = tfqc.compile(its, target, pipeline=recipe, steps=2, calibration=2)
        made = tfqc.load(artifact.save(tmp_path / str(number)))(**its.example_inputs)
        wanted = its.model(**its.example_inputs)
        assert (made - wanted).norm() < 0.5 * wanted.norm()  # noise clips


def test_what_is_planned_in_floating_point_is_no_mistake() -> None:
    its = spec(lambda: nn.Conv2d(4, 4, 1), True)
    recipe = (
        "normalize,discover-tib,plan-quantization{weights=none activations=none},select-maintenance,calibrate-weights,"
        "calibrate-activations,fold-cache,insert-qdq"
    )
    plan = "layer weight -> float input -> float\nproduct weight -> float input -> float\n"
    artifact = tfqc.compile(its, "fake-quant", plan=plan, steps=2, calibration=2)
    assert artifact.facts["plan"] == plan
    assert tfqc.compile(its, "fake-quant", pipeline=recipe, steps=2, calibration=2).facts["plan"] == ""


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("%add self -> int8", r"The self of %add.* is planned as int8.*no pass has found its parameters"),
        ("layer wieght -> int8", r"Line 1 of the plan: .* has no operand 'wieght', but .*: did you mean 'weight'\?\n"),
        ("\ufefflayer weight -> int8", r"planned as int8, which"),
    ],
)
def test_plans_that_nothing_can_carry_out(plan: str, why: str) -> None:
    with pytest.raises(TfqcError, match=why):
        tfqc.compile(spec(lambda: nn.Conv2d(4, 4, 1), True), "fake-quant", plan=plan, steps=2, calibration=2)
