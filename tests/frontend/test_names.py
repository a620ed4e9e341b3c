"""Names as models have them: captured, said in IR text, emitted, loaded and called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tfqc
from tests.helpers import run_pass
from tests.subjects import assert_text_round_trip
from tfqc.errors import CaptureError
from tfqc.frontend import capture
from tfqc.frontend.names import input_names, tensor_names
from tfqc.ir.program import Role
from tfqc.models.spec import ModelSpec
from tfqc.passes.normalize import Normalize
from tfqc.runtime import buffer_name

X, T = torch.linspace(-1, 1, 12).reshape(2, 6), torch.tensor([0, 250])

PARTS = [
    "a b", "k:v", "é", "噪声", "0", "'q'", '"d"', "class", "lambda", "A", "a", "a_b", "A_B", "x/y", "a\nb", "{n}",
    "a,b)", "self",
]  # fmt: skip
CONDITIONS = [
    "self", "row", "row_0", "step", "time", "begin", "torch", "F", "aten", "k", "w", "input", "input_input", "class",
    "a b", "噪声", "é", "_", "__x", "0", "textEmb", "TextEmb", "text_emb", "linear", "quantize", "get", "print",
    "Tensor", "inputs",
]  # fmt: skip


class Named(nn.Module):
    """Submodules, parameters and conditions of any name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({n: nn.Linear(6, 6) for n in PARTS})
        self.vectors = nn.ParameterDict({n: torch.randn(6) for n in PARTS})
        for number, name in enumerate(
            ("a_b", "a__b", "step", "plan", "graph", "forward_", "_x", "lambda", "b c", "b:c")
        ):
            self.register_buffer(name, torch.full((6,), 0.1 * number))
        self.a = nn.Module()
        self.a.b = nn.Parameter(torch.randn(6))
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        hidden = x + torch.sin(t.float())[:, None] * self.a.b
        for name in PARTS:
            hidden = hidden + torch.tanh(self.layers[name](hidden)) * self.vectors[name]
        for number, value in enumerate((*(b for _, b in self.named_buffers()), *cond.values())):
            hidden = hidden + number * value
        return hidden


def arguments(names: list[str]) -> type[nn.Module]:
    """A model whose arguments are called so."""
    code = f"def forward(self, t, x, {', '.join(names)}):\n    return self.run(x, t, [{', '.join(names)}])"

    class Arguments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.requires_grad_(False)

        def run(self, x: Tensor, t: Tensor, values: list[Tensor]) -> Tensor:
            hidden = self.first(x) + torch.sin(t.float())[:, None]
            return sum((n * torch.tanh(self.second(v)) for n, v in enumerate(values, 1)), hidden)

    scope: dict[str, Any] = {}
    exec(code, scope)
    Arguments.forward = scope["forward"]
    return Arguments


def example(names: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(2, 6, generator=generator) for n in names}


def named() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Named(), {"x": X, "t": T, "cond": example(CONDITIONS)}


def argued() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    names = [n for n in CONDITIONS if n.isidentifier() and n not in ("self", "time", "class")]
    return arguments(names)(), {"x": X, "t": T, **example(names)}


@pytest.mark.parametrize("make", [named, argued])
def test_any_name_is_captured_and_said(make: Any) -> None:
    model, inputs = make()
    program = capture(model, inputs)
    torch.testing.assert_close(program(**inputs), model(**inputs), rtol=0, atol=0)
    assert_text_round_trip(run_pass(program, Normalize()), inputs)


@pytest.mark.parametrize("make", [named, argued])
@pytest.mark.parametrize("target", ["fake-quant{weights=none activations=none}", "cpu-int8"])
def test_any_name_is_emitted(make: Any, target: str, tmp_path: Path) -> None:
    model, inputs = make()
    spec = ModelSpec("a model", model, inputs, diffusers.DDIMScheduler())
    tfqc.compile(spec, target, steps=4, calibration=3).save(tmp_path / "out")
    got, want = tfqc.load(tmp_path / "out")(**inputs), model(**inputs)
    if "none" in target:
        torch.testing.assert_close(got, want)
    else:  # calibrated on other conditions
        assert float((got - want).norm() / want.norm()) < 0.2


def test_names_of_inputs() -> None:
    paths = [("x",), ("textEmb",), ("a", "b"), ("a_b",), ("row",), ("噪",), ("self",)]
    assert list(input_names(paths).values()) == [
        "x",
        "text_emb",
        "a_b",
        "a_b_1",
        "input_row",
        "input_input",
        "input_self",
    ]


def test_names_of_tensors() -> None:
    own = [
        "inner.weight",
        "p.a b",
        "p.a:b",
        "a.b",
        "a__b",
        "0.weight",
        "class",
        "m.class.bias",
        "plan",
        "P.a b",
        "a._b",
        "a_.b",
    ]
    names = tensor_names(own)
    assert names["inner.weight"] == "inner.weight"
    assert names["p.a b"] == "p.a_b"
    assert names["p.a:b"] == "p.a_b_1"
    assert names["0.weight"] == "tensor_0.weight"
    assert names["m.class.bias"] == "m.class_.bias"
    assert len({buffer_name(n) for n in names.values()}) == len(own)


# -- one way to find the sample and the time -----------------------------------------------------------------


class Swapped(nn.Module):
    """The time comes first, and the request is called like an argument of samplers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.requires_grad_(False)

    def forward(self, t: Tensor, x: Tensor, denoiser: Tensor) -> Tensor:
        return self.inner(x) + torch.sin(t.float())[:, None] + denoiser


ROLES = [None, {"x": "sample"}, {"t": "time"}, {"x": "sample", "t": "time"}, {"x": "time", "t": "sample"}]


@pytest.mark.parametrize("roles", ROLES)
def test_capture_and_calibration_find_the_same_sample(roles: dict[str, str] | None) -> None:
    x_is_time = roles is not None and roles.get("x") == "time"
    inputs = {"t": X if x_is_time else T, "x": T if x_is_time else X, "denoiser": X}

    class Model(Swapped):
        def forward(self, t: Tensor, x: Tensor, denoiser: Tensor) -> Tensor:
            return super().forward(*((x, t) if x_is_time else (t, x)), denoiser)

    model = Model()
    spec = ModelSpec("m", model, inputs, diffusers.DDIMScheduler(), roles=roles)
    assert spec.sample_shape() == (6,)
    assert list(spec.calibration(3).cond) == ["denoiser"]
    artifact = tfqc.compile(spec, "fake-quant{weights=8 activations=8}", steps=2, calibration=3)
    assert {i["path"][0]: i["role"] for i in artifact.facts["inputs"]}["t" if x_is_time else "x"] == "sample"


def test_the_place_nested_least_is_meant() -> None:
    class Nested(Swapped):
        def forward(self, t: Tensor, x: Tensor, more: Mapping[str, Tensor]) -> Tensor:
            return super().forward(t, x, more["x"] * more["t"])

    program = capture(Nested(), {"t": T, "x": X, "more": {"x": X, "t": X}})
    assert {i.path: i.role for i in program.inputs} == {
        ("t",): Role.TIME, ("x",): Role.SAMPLE, ("more", "x"): Role.REQUEST, ("more", "t"): Role.REQUEST,
    }  # fmt: skip


def test_a_number_is_the_time_where_the_role_says_so() -> None:
    class Level(Swapped):
        def forward(self, level: Tensor, x: Tensor, strength: float) -> Tensor:
            return super().forward(level, x, x * strength)

    program = capture(Level(), {"level": 3, "x": X, "strength": 2}, roles={"level": "time"})
    assert program.input(Role.TIME)[0].path == ("level",)
    assert program.constants == {("strength",): 2}


def test_names_that_cannot_be_told_apart_are_refused() -> None:
    class Dotted(Swapped):
        def forward(self, t: Tensor, x: Tensor, c: Any) -> Tensor:
            return super().forward(t, x, c["a.b"] + c["a"]["b"])

    with pytest.raises(CaptureError, match=r"Two inputs are called 'c.a.b'"):
        capture(Dotted(), {"t": T, "x": X, "c": {"a.b": X, "a": {"b": X}}})


def test_inputs_beyond_the_names_are_refused() -> None:
    class Rest(Swapped):
        def forward(self, t: Tensor, x: Tensor, **rest: Tensor) -> Tensor:
            return super().forward(t, x, rest["more"])

    with pytest.raises(CaptureError, match=r"Rest takes no input 'more' but in \*\*rest, .*: write a module around it"):
        capture(Rest(), {"t": T, "x": X, "more": X})
