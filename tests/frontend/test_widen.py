"""Models in half precision: captured as they are, computed in f32, their weights never there a second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tfqc
from tests.helpers import first, run_pass
from tests.models import MODELS
from tfqc.errors import PassError
from tfqc.frontend import capture
from tfqc.ir.parse import parse
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.models.spec import ModelSpec
from tfqc.passes.normalize import Normalize

HALVES = [torch.bfloat16, torch.float16]
UNQUANTIZED = "fake-quant{weights=none activations=none}"
TARGETS = ["fake-quant", "cpu-int8", "cuda-int4{arch=sm_86 mode=w4a8}"]


class Mixed(nn.Module):
    """A norm in f32 between layers in half precision, casts written out, a table of labels, a bare matrix."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.inner, self.out, self.time = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 32)
        self.norm, self.labels = nn.LayerNorm(32), nn.Embedding(10, 32)
        self.matrix = nn.Parameter(torch.randn(32, 32) / 6)
        self.to(dtype).requires_grad_(False)
        self.norm.float()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = t.float()[:, None] * torch.logspace(0, -3, 16)
        h = self.inner(x.to(self.dtype)) + self.time(torch.sin(angles).to(self.dtype))
        h = self.norm(h.float()).to(self.dtype) + self.labels(labels)
        return self.out(F.silu(h @ self.matrix))


def mixed(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    return Mixed(dtype), {"x": x.to(dtype), "t": torch.tensor([750, 750]), "labels": torch.tensor([1, 2])}


def in_half(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """One of the models of all tests, and its inputs, in half precision."""
    if name == "mixed":
        return mixed(dtype)
    model, inputs = MODELS[name]()
    return model.to(dtype), cast(inputs, dtype)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def distance(got: Any, want: Any) -> float:
    a, b = first(got).float(), first(want).float()
    return float((a - b).norm() / b.norm())


def compiled(model: nn.Module, inputs: dict[str, Any], target: str, out: Path) -> nn.Module:
    spec = ModelSpec("half", model, inputs, diffusers.DDIMScheduler())
    tfqc.compile(spec, target, steps=4, calibration=2).save(out)
    return tfqc.load(out)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["unet2d", "dit", "flux-guidance", "mixed"])
def test_without_quantization_it_is_the_model_but_for_its_roundings(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, inputs = in_half(name, dtype)
    loaded = compiled(model, inputs, UNQUANTIZED, tmp_path / "out")
    got, want = loaded(**inputs), model(**inputs)
    assert first(got).dtype == first(want).dtype == dtype
    assert distance(got, want) < (0.02 if dtype is torch.bfloat16 else 0.004)
    wide = model.float()
    if name != "mixed":  # whose own code goes on rounding
        exact = wide(**cast(inputs, torch.float32))
        assert distance(loaded(**cast(inputs, torch.float32)), exact) < 1e-5


@pytest.mark.filterwarnings("ignore:Kernels for CUDA run with torch here")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["unet2d", "mixed"])
def test_quantized_it_is_as_near_as_the_same_model_in_f32(name: str, target: str, tmp_path: Path) -> None:
    model, inputs = in_half(name, torch.bfloat16)
    got = compiled(model, inputs, target, tmp_path / "half")
    one = distance(got(**inputs), model(**inputs))
    if name == "mixed":
        assert one < 0.25
        return
    wide = cast(inputs, torch.float32)
    other = distance(compiled(model.float(), wide, target, tmp_path / "wide")(**wide), model(**wide))
    assert one < 1.1 * other + 0.02


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_examples_may_be_in_another_precision_than_the_weights(given: torch.dtype) -> None:
    model, inputs = in_half("dit", torch.bfloat16)
    program = run_pass(capture(model, cast(inputs, given)), Normalize())
    assert distance(program(**inputs), model(**inputs)) < 0.02


def test_examples_in_half_precision_of_a_model_in_f32() -> None:
    model, inputs = MODELS["dit"]()
    program = capture(model, cast(inputs, torch.bfloat16))
    assert distance(program(**inputs), model(**inputs)) < 1e-6


def test_a_captured_program_is_the_model_bit_for_bit() -> None:
    model, inputs = in_half("mixed", torch.bfloat16)
    assert torch.equal(first(capture(model, inputs)(**inputs)), model(**inputs))


def test_weights_are_stored_as_they_are_and_once(tmp_path: Path) -> None:
    model, inputs = in_half("mixed", torch.bfloat16)
    program = run_pass(capture(model, inputs), Normalize())
    own = model.inner.weight.data_ptr()  # type: ignore[union-attr, operator]
    assert program.tensors["inner.weight"].data_ptr() == own
    compiled(model, inputs, UNQUANTIZED, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "weights.safetensors")
    matrices = [t.dtype for t in stored.values() if t.dim() > 1 and t.is_floating_point() and len(t) > 4]
    assert len(matrices) >= 4 and set(matrices) == {torch.bfloat16}
    assert stored["inner.bias"].dtype is torch.float32


def test_a_second_run_changes_nothing() -> None:
    model, inputs = in_half("mixed", torch.bfloat16)
    program = run_pass(capture(model, inputs), Normalize())
    text = render(program)
    assert "cast" not in text and ": 16x32xbf16" in text
    assert render(run_pass(program, Normalize())) == text
    assert render(parse(text)) == text


class Code(nn.Module):
    def __init__(self, code: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.code = nn.Linear(6, 6).bfloat16().requires_grad_(False), code

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(self.code(self, x, t)) + t[:, None]


def program_of(code: Callable[[Any, Tensor, Tensor], Tensor]) -> tuple[nn.Module, Program]:
    model = Code(code)
    return model, capture(model, {"x": X, "t": T})


X, T = torch.linspace(-1, 1, 12).reshape(2, 6).bfloat16(), torch.tensor([7, 421])


def _in_place_behind_a_cast(self: Any, x: Tensor, t: Tensor) -> Tensor:
    doubled = x * 2
    wide = doubled.float()
    wide.add_(1)
    return doubled + wide.to(x.dtype)


CODES: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
    _in_place_behind_a_cast,
    lambda self, x, t: x + torch.full_like(x, 0.5) + torch.arange(6, dtype=x.dtype),
    lambda self, x, t: F.rms_norm(x * 0.01, (6,)),
    lambda self, x, t: torch.where(x > 0, x, torch.finfo(x.dtype).min / 1e30),
    lambda self, x, t: x.softmax(-1, dtype=torch.float32).type_as(x),
    lambda self, x, t: x + self.inner.weight.to(t.device)[0],
    lambda self, x, t: torch.cat([x.new_zeros(x.shape[0], 3), x], 1)[:, 3:] @ self.inner.weight.T,
]


@pytest.mark.parametrize("code", CODES)
def test_code_that_speaks_of_dtypes(code: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    model, program = program_of(code)
    run_pass(program, Normalize())
    assert distance(program(x=X, t=T), model(X, T)) < 0.01
    assert "bf16 = " not in render(program)


def test_bits_are_no_numbers() -> None:
    _, program = program_of(lambda self, x, t: x.view(torch.int16).to(x.dtype))
    with pytest.raises(PassError, match="reads the bits of numbers in half precision"):
        run_pass(program, Normalize())
