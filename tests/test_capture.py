"""Capture: the program is the model, at every batch; what cannot be captured is refused with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import find, first, with_batch
from tests.models import MODELS, Example, timeless
from tfqc.errors import CaptureError
from tfqc.frontend import capture
from tfqc.ir.program import Program, Role
from tfqc.ir.types import TensorType, symbols_of

X, T = torch.linspace(-1, 1, 12).reshape(2, 6), torch.tensor([7, 421])


class Linear(nn.Module):
    """x through one linear layer; subclasses say what becomes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)


# -- every model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_program_equals_model_bit_for_bit(
    name: str, example: Callable[[str], Example], captured: Callable[[str], Program]
) -> None:
    model, inputs = example(name)
    program = captured(name)
    for batch in (1, 2, 3):
        call = with_batch(inputs, batch)
        with torch.no_grad():
            torch.testing.assert_close(first(program(**call)), first(model(**call)), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_batch_stays_a_symbol(name: str, example: Callable[[str], Example], captured: Callable[[str], Program]) -> None:
    program = captured(name)
    assert program.symbols == {"B": 2}
    assert {s for t in program.types.values() for s in symbols_of(t)} == {"B"}
    for item in program.inputs:
        type_ = program.types[item.name]
        assert isinstance(type_, TensorType)
        whole_call = {"img_ids", "txt_ids"}  # positions, the same for every image
        assert (type_.shape[0] == "B") == (item.name not in whole_call), item.name
    results = next(n for n in program.step.nodes if n.op == "output").all_input_nodes
    types = [program.tensor_type(n) for n in results]
    assert [t.shape[0] for t in types if t] == ["B"] * len(results)


@pytest.mark.parametrize("name", MODELS)
def test_origins_are_modules_and_lines(
    name: str, example: Callable[[str], Example], captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    modules = {n for n, _ in example(name)[0].named_modules()}
    assert {o.module for o in program.origins.values()} <= modules
    assert all(o.source.partition(".py:")[2].isdigit() for o in program.origins.values())


# -- inputs --------------------------------------------------------------------------------------------------


def test_roles_by_the_names_that_diffusers_gives(captured: Callable[[str], Program]) -> None:
    program = captured("unet-sdxl")
    assert [(i.name, i.role, i.path) for i in program.inputs] == [
        ("sample", Role.SAMPLE, ("sample",)),
        ("timestep", Role.TIME, ("timestep",)),
        ("encoder_hidden_states", Role.REQUEST, ("encoder_hidden_states",)),
        ("added_cond_kwargs_text_embeds", Role.REQUEST, ("added_cond_kwargs", "text_embeds")),
        ("added_cond_kwargs_time_ids", Role.REQUEST, ("added_cond_kwargs", "time_ids")),
    ]


def test_example_of_batch_one_and_scalar_timestep() -> None:
    model, inputs = MODELS["in-place"]()
    program = capture(model, {"x": inputs["x"][:1], "t": torch.tensor(7)})
    torch.testing.assert_close(program(**inputs), model(**inputs), rtol=0, atol=0)
    torch.testing.assert_close(program(x=inputs["x"], t=9), model(inputs["x"], torch.tensor([9, 9])), rtol=0, atol=0)


def test_python_number_as_timestep() -> None:
    model, inputs = MODELS["in-place"]()
    program = capture(model, {"x": inputs["x"], "t": 7})
    torch.testing.assert_close(program(**inputs), model(**inputs), rtol=0, atol=0)


def test_inputs_may_have_names_that_python_uses() -> None:
    class Builtins(Linear):
        def forward(self, input: Tensor, range: Tensor) -> dict[str, Any]:
            return {"out": self.inner(input) + range[:, None], "rest": [input]}

    model = Builtins()
    program = capture(model, {"input": X, "range": T}, roles={"input": "sample", "range": "time"})
    assert program.input(Role.TIME)[0].path == ("range",)
    got, want = program(input=X, range=T), model(X, T)
    torch.testing.assert_close(got["out"], want["out"], rtol=0, atol=0)


def test_training_mode_is_put_back() -> None:
    model, inputs = MODELS["in-place"]()
    model.train()
    capture(model, inputs)
    assert model.training


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"roles": {"y": "time"}}, "There is no input 'y' to give a role; the inputs are x, t"),
        ({"roles": {"x": "noise"}}, "'noise' is no role: use sample, time or request"),
        ({"roles": {"x": "time"}}, "No input has the role 'sample': name the noisy sample"),
        ({"dynamic": {"x": {1: "h"}}}, "'h' is no name for a dimension"),
        ({"dynamic": {"y": {1: "H"}}}, "There is no input 'y' with dynamic dimensions"),
        ({"dynamic": {"x": {1: "H"}}}, "cannot be captured for every H|could not be exported"),
    ],
)
def test_refused_options(options: dict[str, Any], sentence: str) -> None:
    model, inputs = MODELS["in-place"]()
    with pytest.raises(CaptureError, match=sentence):
        capture(model, inputs, **options)


def test_a_model_without_a_time_is_refused() -> None:
    model, inputs = timeless()
    with pytest.raises(
        CaptureError, match=r"No input has the role 'time': name the timestep with roles=.*inputs are x"
    ):
        capture(model, inputs)


def test_an_unknown_input_is_refused() -> None:
    model, inputs = MODELS["in-place"]()
    with pytest.raises(CaptureError, match="InPlace takes no input 'mask'; it takes x, t"):
        capture(model, {**inputs, "mask": X})


# -- what torch.export leaves in a graph ---------------------------------------------------------------------


def test_regions_are_inlined_and_constants_kept() -> None:
    class Regions(Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                scaled = t[:, None].float() * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
            with torch.enable_grad():
                scaled = scaled * torch.tensor([0.5, 2.0]).sum()
                with torch.autocast("cpu", enabled=False):
                    hidden = self.inner(x)
            return hidden + scaled

    model = Regions()
    program = capture(model, {"x": X, "t": T})
    assert not find(program, "wrap_with")
    assert len(find(program, "linear")) == 1
    assert any("lifted" in name for name in program.tensors)
    torch.testing.assert_close(program(x=X, t=T), model(X, T), rtol=0, atol=0)


def test_autocast_is_refused() -> None:
    class Autocast(Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x) * t[:, None]

    with pytest.raises(CaptureError, match=r"turns autocast on around test_capture.py:\d+: convert it"):
        capture(Autocast(), {"x": X, "t": T})


def test_double_and_complex_numbers(captured: Callable[[str], Program]) -> None:
    types = {str(t).rpartition("x")[2] for t in captured("flux").types.values()}
    assert "f64" in types

    class Rotary(Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            turned = torch.view_as_complex(self.inner(x).reshape(-1, 3, 2)) * torch.polar(
                torch.ones(3), torch.arange(3.0)
            )
            return torch.view_as_real(turned).flatten(1) + t[:, None]

    model = Rotary()
    program = capture(model, {"x": X, "t": T})
    assert TensorType(torch.complex64, ("B", 3)) in program.types.values()
    torch.testing.assert_close(program(x=X, t=T), model(X, T), rtol=0, atol=0)


def test_division_without_rounding_is_no_division() -> None:
    class Divides(Linear):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            return self.inner(x) + t[:, None] + torch.cat([mask, mask]).reshape(x.shape[0], -1).sum(1, keepdim=True)

    program = capture(Divides(), {"x": X, "t": T, "mask": torch.ones(2, 3)})
    (reshape,) = find(program, "reshape")
    assert program.types[reshape.name] == TensorType(torch.float32, ("B", 6))


# -- what holds for some sizes only --------------------------------------------------------------------------


class Fixed(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x.view(2, 6)) + t[:, None]


class Even(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x) + t[:, None] if x.shape[0] % 2 else self.inner(x) * t[:, None]


@pytest.mark.parametrize(("model", "reason"), [(Fixed, r"== 12"), (Even, r"x.size\(\)\[0\] % 2 == 0")])
def test_code_for_some_batches_is_refused(model: type[nn.Module], reason: str) -> None:
    with pytest.raises(CaptureError, match=rf"{model.__name__} cannot be captured for every B: .*{reason}"):
        capture(model(), {"x": X, "t": T})


def test_dynamic_height_and_width(example: Callable[[str], Example]) -> None:
    model, inputs = example("unet-sd")
    program = capture(model, inputs, dynamic={"sample": {2: "H", 3: "W"}})
    assert program.symbols == {"B": 2, "H": 8, "W": 8}
    call = {**inputs, "sample": torch.linspace(-1, 1, 2 * 4 * 12 * 4).reshape(2, 4, 12, 4)}
    torch.testing.assert_close(first(program(**call)), first(model(**call)), rtol=0, atol=0)


def test_square_images_only_is_said(example: Callable[[str], Example]) -> None:
    model, inputs = example("dit")
    with pytest.raises(CaptureError, match=r"cannot be captured for every H: .* // 2 == 4"):
        capture(model, inputs, dynamic={"hidden_states": {2: "H", 3: "W"}})


# -- failures and size ---------------------------------------------------------------------------------------


def test_export_failure_names_the_line() -> None:
    class Decides(Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            hidden = self.inner(x)
            if hidden.sum() > 0:  # the line that the error names
                return hidden
            return hidden + t[:, None]

    source, start = inspect.getsourcelines(Decides)
    line = start + next(i for i, text in enumerate(source) if "# the line that the error names" in text)
    with pytest.raises(CaptureError, match=rf"Decides could not be exported at .*test_capture.py:{line} in forward"):
        capture(Decides(), {"x": X, "t": T})


def test_stable_diffusion_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        inputs = {
            "sample": torch.empty(2, 4, 64, 64),
            "timestep": torch.empty(2, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(2, 77, 768),
        }
    program = capture(model, inputs)
    assert not program.has_weights
    assert program.symbols == {"B": 2}
    assert sum(t.numel() for t in program.tensors.values()) == 859_520_964
