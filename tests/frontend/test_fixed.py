"""Code that decides by values: those of request inputs become constants, those of others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

import tfqc
from tfqc.errors import CalibrationError, CaptureError
from tfqc.frontend import capture
from tfqc.frontend.attempts import FixedWarning
from tfqc.ir.parse import parse
from tfqc.ir.render import render
from tfqc.passes.normalize import Normalize
from tfqc.passing.pipeline import Pipeline

X, T = torch.linspace(-1, 1, 24).reshape(2, 2, 6), torch.tensor([7, 421])
MASK = torch.tensor([[True, True, False, True]] * 2)

Code = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Decides(nn.Module):
    def __init__(self, code: Code) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.code, self.cache = nn.Linear(6, 6), code, {}
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x) * t[:, None, None] + self.code(self, x, text, mask)


def lengths(self: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    longest = max(set(mask.sum(1).tolist()))
    return text[:, :longest].mean(1, keepdim=True)


def rows(self: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([torch.cat([own[m], own[~m]]).cumsum(0) for own, m in zip(text, mask, strict=True)])[:, 1:3]


def bounds(self: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    seen = torch.zeros(text.shape[:2], dtype=torch.bool)
    for i, end in enumerate(mask.sum(1)):
        seen[i, :end] = True
    return text.masked_fill(~seen[..., None], 0.0).sum(1, keepdim=True)


def numpys(self: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    repeats = mask[0].long() + 1
    wide = text.repeat_interleave(repeats, dim=1)
    return wide[:, : int(repeats.numpy().sum())].sum(1, keepdim=True) if bool(mask.any()) else x


@pytest.mark.parametrize("code", [lengths, rows, bounds, numpys])
def test_values_that_code_decides_by_are_constants(code: Code) -> None:
    model, text = Decides(code), torch.randn(2, 4, 6)
    with pytest.warns(FixedWarning, match=r"Decides: mask has one value for good, by which \S*test_fixed.py:\d+ in"):
        program = capture(model, {"x": X, "t": T, "text": text, "mask": MASK})
    assert [i.name for i in program.inputs] == ["x", "t", "text"]
    again = parse(render(program), program.tensors)
    for images in (1, 2, 3):
        x, own, mask = torch.randn(images, 2, 6), torch.randn(images, 4, 6), MASK[:1].expand(images, 4)
        got = again(x=x, t=9, text=own, mask=mask.long())  # in another dtype
        want = model(x, torch.tensor([9] * images), own, mask)
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"mask is a tensor 2x4, but the model was captured with 'rows of \[4\] bool"):
        program(x=X, t=T, text=text, mask=~MASK)


def test_calls_with_several_values_are_refused() -> None:
    """Before anything is calibrated on them."""
    calls = [{"x": X, "t": T, "text": torch.randn(2, 4, 6), "mask": mask} for mask in (MASK, ~MASK)]
    with (
        pytest.warns(FixedWarning),
        pytest.raises(CalibrationError, match="Decides decides by the values of mask, so it is compiled for one of"),
    ):
        tfqc.compile(Decides(lengths), "fake-quant", schedule=[421, 7], calibration=calls, example_inputs=calls[0])


def test_what_differs_from_step_to_step_is_refused() -> None:
    model = Decides(lambda self, x, text, mask: x * 2 if float(x.sum()) > 0 else x)
    with pytest.raises(
        CaptureError, match=r"Decides decides at \S*test_fixed.py:\d+ in <lambda> by the values of x, which differ"
    ):
        capture(model, {"x": X, "t": T, "text": X, "mask": MASK})


def test_caches_hold_no_traced_tensors_afterwards() -> None:
    def code(self: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        if "rotary" not in self.cache:
            self.cache["rotary"] = self.rotary = torch.polar(torch.ones(6), torch.arange(6.0)).to(torch.complex128)
        return x * self.cache["rotary"].real.float()

    model = Decides(code)
    inputs = {"x": X, "t": T, "text": X, "mask": MASK}
    capture(model, inputs)
    assert not model.cache and not hasattr(model, "rotary")
    want = model(**inputs)
    program = Pipeline((Normalize(),)).run(capture(model, inputs))  # of a model whose cache is filled
    torch.testing.assert_close(program(**inputs), want)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_writes_to_data_and_sparse_attention() -> None:
    def code(self: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        places = x.new_zeros(1, 2, 6)
        places.data[:, 1:].copy_(torch.arange(6.0))
        blocks = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
        wide = torch.cat([x[:, None], x.new_zeros(x.shape[0], 1, 126, 6)], 2)
        wide = torch.cat([wide, wide, wide[..., :4]], -1)
        return flex.flex_attention(wide, wide * 2, wide + 1, block_mask=blocks)[:, 0, :2, :6] + places

    model = Decides(code)
    inputs = {"x": X, "t": T, "text": X, "mask": MASK}
    program = Pipeline((Normalize(),)).run(capture(model, inputs))
    torch.testing.assert_close(program(**inputs), model(**inputs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_with_a_function_of_scores_is_refused() -> None:
    def attend(self: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        wide = text[:, None]
        return flex.flex_attention(wide, wide, wide, score_mod=lambda score, b, h, q, k: score * 2)[:, 0, :2]

    model = Decides(attend)
    with pytest.raises(
        CaptureError, match=r"could not be exported at \S*test_fixed.py:\d+ in attend: flex_attention with"
    ):
        capture(model, {"x": X, "t": T, "text": torch.randn(2, 4, 6), "mask": MASK})


def test_each_module_keeps_its_mode() -> None:
    model = Decides(lambda self, x, text, mask: x).train()
    model.inner.eval()
    capture(model, {"x": X, "t": T, "text": torch.randn(2, 4, 6), "mask": MASK})
    assert model.training and not model.inner.training


class Unlike(nn.Module):
    """Takes two images at once, and adds the first to the second, or not."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.adds = nn.Linear(6, 6), adds

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second = self.inner(x) * t[:, None, None]
        return torch.stack([first, second + first if self.adds else second])


def test_images_that_are_not_computed_alike_are_refused() -> None:
    with pytest.warns(FixedWarning, match="2 images are computed at once"):
        program = capture(Unlike(False), {"x": X, "t": T})
    x, t = torch.randn(5, 2, 6), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    wanted = torch.cat([Unlike(False)(x=x[i : i + 2], t=t[i : i + 2]) for i in (0, 2)])
    torch.testing.assert_close(program(x=x, t=t.long())[:4], wanted)
    with pytest.raises(CaptureError, match="Unlike does not compute all images of a batch alike"):
        capture(Unlike(True), {"x": X, "t": T})


class Videos(nn.Module):
    """Frames of videos, two each, that look at each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        pairs = (self.inner(x) * t[:, None, None]).reshape(-1, 2, *x.shape[1:])
        return (pairs + pairs.mean(1, keepdim=True).sin()).reshape(x.shape)


def test_a_batch_of_whole_videos_takes_any_number_of_them() -> None:
    model = Videos()
    x, t = torch.randn(6, 2, 6), torch.tensor([7.0] * 6)
    program = capture(model, {"x": x[:4], "t": t[:4]})
    assert (program.batch, program.guards) == ("B", ("B % 2 == 0",))
    for frames in (2, 4, 6):
        torch.testing.assert_close(program(x=x[:frames], t=t[:frames]), model(x[:frames], t[:frames]))
    with pytest.raises(ValueError, match="with B even"):
        program(x=x[:3], t=t[:3])


class Experts(nn.Module):
    """Each expert takes as many tokens as a tensor says that is made of sizes; or the first image alone is taken."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights, self.alone = nn.Parameter(torch.randn(2, 6, 6)), alone

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.alone:
            (x,) = x
            return (x @ self.weights[0] * t)[None]
        tokens = x.transpose(0, 1).flatten(0, 1)
        counts = torch.full((2,), len(tokens) // 2)
        parts = [part @ weight for part, weight in zip(tokens.split(counts.tolist()), self.weights, strict=True)]
        return torch.cat(parts).reshape(2, -1, 6).transpose(0, 1) * t[:, None, None]


@pytest.mark.parametrize("alone", [False, True])
def test_code_that_takes_the_examples_images_alone(alone: bool) -> None:
    model, images = Experts(alone), 1 if alone else 2
    call = {"x": torch.randn(images, 2, 6), "t": torch.full((images,), 3.0)}
    with pytest.warns(FixedWarning, match=rf"Experts: {images} images? (is|are) computed at once"):
        program = capture(model, call)
    assert program.batch == images
    torch.testing.assert_close(program(**call), model(**call))


class Shaped(nn.Module):
    """Told the size of each image by a list of numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        height, width = shapes[0]
        return self.inner(x) * t[:, None, None] + height * width


@pytest.mark.parametrize("images", [1, 2])
def test_a_list_of_numbers_for_each_image_is_as_long_as_the_call(images: int) -> None:
    model = Shaped()
    program = capture(model, {"x": X[:images], "t": T[:images], "shapes": [(3, 4)] * images})
    for number in (1, 2, 3):
        call = {"x": torch.randn(number, 2, 6), "t": torch.full((number,), 7.0), "shapes": [(3, 4)] * number}
        torch.testing.assert_close(program(**call), model(**call))
    with pytest.raises(ValueError, match=r"shapes.\*.1 is 5, but the model was captured with 4"):
        program(**{**call, "shapes": [(3, 4), (3, 5), (3, 4)]})
