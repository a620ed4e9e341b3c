"""Capture: the program is the model, at every batch; what cannot be captured is refused with the reason."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.helpers import find, first, with_batch
from tests.models import MODELS, Example, timeless
from tfqc.errors import CaptureError
from tfqc.frontend import capture
from tfqc.frontend.attempts import FixedWarning
from tfqc.ir.parse import parse
from tfqc.ir.program import Program, Role
from tfqc.ir.render import render
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


def test_a_model_without_a_time_is_captured() -> None:
    model, inputs = timeless()
    program = capture(model, inputs)
    assert not program.input(Role.TIME)
    torch.testing.assert_close(program(**inputs), model(**inputs))


def test_an_unknown_input_is_refused() -> None:
    model, inputs = MODELS["in-place"]()
    with pytest.raises(CaptureError, match="InPlace takes no input 'mask'; it takes x, t"):
        capture(model, {**inputs, "mask": X})


# -- what a call is ------------------------------------------------------------------------------------------


class Called(Linear):
    def forward(
        self, x: Tensor, t: Tensor, frames: int = 1, *, scale: float = 0.5, mode: str = "a", mask: Tensor | None = None,
        sizes: Any = None, return_dict: bool = True,
    ) -> Tensor:  # fmt: skip
        return self.inner(x) * frames * scale + t[:, None] * (sizes["s"][0][1] if sizes else 1)


def test_arguments_and_constants_of_a_call() -> None:
    program = capture(Called(), {"t": T, "x": X, "frames": 2, "sizes": {"s": [(4, 3)], "of": None}})
    assert program.arguments == ("x", "t", "frames", "scale", "mode", "mask", "sizes", "return_dict")
    assert program.constants == {
        ("frames",): 2, ("sizes", "s", "0", "0"): 4, ("sizes", "s", "0", "1"): 3, ("sizes", "of"): None,
        ("scale",): 0.5, ("mode",): "a",
    }  # fmt: skip
    again = parse(render(program), program.tensors)
    assert (again.arguments, again.constants) == (program.arguments, program.constants)


def test_none_for_a_number_is_captured_as_none() -> None:
    class Scaled(Linear):
        def forward(self, x: Tensor, t: Tensor, scale: float | None = 3.0) -> Tensor:
            return self.inner(x) * (7.0 if scale is None else scale) + t[:, None]

    program = capture(Scaled(), {"x": X, "t": T, "scale": None})
    assert program.constants == {("scale",): None}
    assert any(7.0 in n.kwargs.values() for n in program.step.nodes)


def test_infinity_may_be_a_constant() -> None:
    program = capture(Called(), {"x": X, "t": T, "scale": math.inf})
    assert program.constants["scale",] == math.inf
    assert parse(render(program), program.tensors).constants["scale",] == math.inf


@pytest.mark.parametrize("value", [torch.float16, slice(1), 1j, Role.TIME.__class__])
def test_what_no_call_could_be_compared_with_is_refused(value: Any) -> None:
    with pytest.raises(
        CaptureError, match=r"The input 'sizes.s' is a \w+: only tensors, numbers, texts and None can be"
    ):
        capture(Called(), {"x": X, "t": T, "sizes": {"s": value}})


def test_too_many_inputs_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"InPlace takes 2 inputs \(x, t\), not 3"):
        capture(MODELS["in-place"]()[0], (X, T, X))


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


class Loops(Linear):
    """A way for each image, a label for each, and two rows of text for each."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, shift: Tensor) -> dict[str, Any]:
        hidden = torch.stack([self.inner(x[i]) * (i + 2 - i) for i in range(x.shape[0])])
        labels = torch.tensor([3] * x.shape[0])[:, None]
        return {"out": hidden + t[:, None] * labels + text.reshape(-1, 2, 6).sum(1), "rest": [text * 2, shift + 1]}


@pytest.mark.parametrize(("model", "reason"), [(Fixed, r"== 12"), (Even, r"x.size\(\)\[0\] % 2 == 0")])
def test_code_for_some_batches_is_captured_for_the_examples(model: type[nn.Module], reason: str) -> None:
    its = model()
    with pytest.warns(FixedWarning, match=rf"{model.__name__}: 2 images are computed at once, .*{reason}"):
        program = capture(its, {"x": X, "t": T})
    assert (program.batch, program.symbols) == (2, {})
    x, t = torch.linspace(-2, 2, 30).reshape(5, 6), torch.arange(5) + 3
    want = torch.cat([its(x[i : i + 2], t[i : i + 2]) for i in (0, 2)] + [its(x[[4, 4]], t[[4, 4]])[:1]])
    torch.testing.assert_close(program(x=x, t=t), want, rtol=0, atol=0)


def test_a_loop_over_images_takes_as_many_as_the_example_has() -> None:
    model = Loops()
    text, shift = torch.linspace(-1, 1, 24).reshape(4, 6), torch.ones(3, 3)
    with pytest.warns(
        FixedWarning, match=r"Loops: 2 images are computed at once, .*Loops cannot be captured for every B"
    ):
        program = capture(model, {"x": X, "t": T, "text": text, "shift": shift})
    for images in (1, 2, 3, 4):
        x, more = torch.randn(images, 6), torch.randn(2 * images, 6)
        got, want = program(x=x, t=7, text=more, shift=shift), model(x, torch.tensor([7]).expand(images), more, shift)
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            torch.testing.assert_close(a, b)


def test_dynamic_height_and_width(example: Callable[[str], Example]) -> None:
    model, inputs = example("unet-sd")
    program = capture(model, inputs, dynamic={"sample": {2: "H", 3: "W"}})
    assert program.symbols == {"B": 2, "H": 8, "W": 8}
    call = {**inputs, "sample": torch.linspace(-1, 1, 2 * 4 * 12 * 4).reshape(2, 4, 12, 4)}
    torch.testing.assert_close(first(program(**call)), first(model(**call)), rtol=0, atol=0)


def test_even_height_and_width_are_guards(example: Callable[[str], Example]) -> None:
    model, inputs = example("unet-sd")
    program = capture(model, inputs, dynamic={"sample": {2: "H", 3: "W"}})
    assert program.guards == ("H % 2 == 0", "W % 2 == 0")
    assert parse(render(program), program.tensors).guards == program.guards


class Sizes(nn.Module):
    """`code(x)` beside a time; x is Bx3xHxW."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.code = nn.Conv2d(3, 3, 5), code

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.code(x) * t.reshape(-1, *[1] * (self.code(x).dim() - 1)) + self.inner.weight.sum()


IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 12).reshape(2, 3, 16, 12)


@pytest.mark.parametrize(
    ("code", "guards"),
    [
        (lambda x: x * 2, ()),
        (lambda x: x * 2 if x.shape[2] > 8 else x, ("H > 8",)),
        (lambda x: x * 2 if x.shape[2] > 8 and x.shape[2] > 4 else x, ("H > 8",)),
        (lambda x: x * 2 if x.shape[2] * x.shape[3] < 40000 else x, ("H*W < 40000",)),
        (lambda x: x * 2 if x.shape[2] != 50 else x, ("H != 50",)),
        (lambda x: x * 2 if x.shape[2] / 4 > 2.5 else x, ("H > 10",)),
        (lambda x: x * 2 if x.shape[0] < 100 else x, ("B < 100",)),
        (lambda x: x.contiguous() if x.shape[0] == 1 else x * 2, ()),
        (lambda x: F.pad(x, (3, 3, 3, 3), mode="reflect"), ("H > 3", "W > 3")),
        (lambda x: F.conv2d(x, torch.ones(3, 3, 5, 3)), ("H >= 5", "W >= 3")),
        (lambda x: F.interpolate(x, scale_factor=0.5), ()),
        (lambda x: x.unflatten(2, (4, -1)), ("H % 4 == 0",)),
        (lambda x: torch.cat([F.interpolate(x[:, :, ::2], scale_factor=(2.0, 1.0)), x], 1), ("H % 2 == 0",)),
    ],
)
def test_what_sizes_have_to_fulfil(code: Callable[[Tensor], Tensor], guards: tuple[str, ...]) -> None:
    program = capture(Sizes(code), {"x": IMAGES, "t": T}, dynamic={"x": {2: "H", 3: "W"}})
    assert program.guards == guards
    assert program.symbols == {"B": 2, "H": 16, "W": 12}


def test_a_new_layout_for_large_batches_is_no_guard() -> None:
    class Lays(Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if x.shape[0] >= 64:
                x = x.contiguous()
            return self.inner(x) + t[:, None]

    assert capture(Lays(), {"x": X, "t": T}).guards == ()


def test_a_condition_that_calls_cannot_be_checked_for_is_refused() -> None:
    root = Sizes(lambda x: x * 2 if x.shape[2] ** 0.5 > 3 else x)
    with pytest.raises(CaptureError, match=r"Sizes decides by .*H.* at test_capture.py:\d+, which is no integer arith"):
        capture(root, {"x": IMAGES, "t": T}, dynamic={"x": {2: "H"}})


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


def test_a_program_in_one_line() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * t[:, None]

    program = capture(Plain(), {"x": torch.ones(2, 3), "t": torch.ones(2)})
    operations = sum(n.op == "call_function" for n in program.step.nodes)
    assert repr(program) == f"<program of Plain, captured: {operations} operations a step>"


def test_an_argument_that_examples_lack_is_named() -> None:
    class TakesTwo(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample * timestep[:, None]

    with pytest.raises(CaptureError, match="TakesTwo could not be exported: missing a required argument: 'timestep'"):
        capture(TakesTwo(), {"sample": torch.randn(2, 4)})
