"""Samples that are a list with a tensor for each image, as Z-Image takes them: captured for one, called with any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import tfqc
from tfqc.errors import CalibrationError, CaptureError
from tfqc.frontend import capture

EXACT, W8A8 = "fake-quant{weights=none activations=none}", "fake-quant{weights=8 activations=8}"


class Listed(nn.Module):
    """Images [4, H, W] and texts [S, 6], padded to the longest of a call and masked."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.text, self.time = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(1, 8)
        self.leave = nn.Linear(8, 4)

    def forward(self, x: list[Tensor], t: Tensor, texts: list[Tensor], style: Tensor) -> tuple[list[Tensor], Tensor]:
        shift = self.time(t[:, None].float() / 1000) + style
        lengths = [len(text) for text in texts]
        texts = list(self.text(torch.cat(texts)).split(lengths))
        means = pad_sequence(texts, batch_first=True).sum(1) / torch.tensor(lengths)[:, None]
        pixels = [self.enter(image.flatten(1).T) + m + s for image, m, s in zip(x, means, shift, strict=True)]
        return [self.leave(p).T.reshape(i.shape) for p, i in zip(pixels, x, strict=True)], shift


class Together(Listed):
    """An image hangs on its neighbours."""

    def forward(self, x: list[Tensor], t: Tensor, texts: list[Tensor], style: Tensor) -> Any:
        middle = sum(x) / len(x)
        return super().forward([each + middle for each in x], t, texts, style)


def made(kind: type[Listed] = Listed) -> Any:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def call(images: int, seed: int = 0, t: float = 749, sizes: tuple[int, ...] = (4, 4), word: int = 1) -> dict[str, Any]:
    """Texts of three words and more, `word` more for each further image."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": [torch.randn(4, *sizes, generator=draw) for _ in range(images)],
        "t": torch.full((images,), t),
        "texts": [torch.randn(3 + word * i, 6, generator=draw) for i in range(images)],
        "style": torch.randn(images, 8, generator=draw),
    }


def same(got: Any, wanted: Any) -> None:
    assert isinstance(got[0], list)
    torch.testing.assert_close(list(got[0]), wanted[0])
    torch.testing.assert_close(got[1], wanted[1])


def test_one_image_is_captured_and_what_differs_is_a_symbol() -> None:
    program = capture(made(), call(2))
    assert [(i.path, str(i.type)) for i in program.inputs] == [
        (("x", "*"), "1x4x4x4xf32"), (("t",), "1xi64"), (("texts", "*"), "1xL0x6xf32"), (("style",), "1x8xf32"),
    ]  # fmt: skip
    for images in (1, 2, 3):
        same(program(**call(images)), made()(**call(images)))


def test_roles_name_the_list() -> None:
    class Named(Listed):
        def forward(self, images: list[Tensor], t: Tensor, texts: list[Tensor], style: Tensor) -> Any:  # pyright: ignore
            return super().forward(images, t, texts, style)

    given = call(2)
    given = {"images": given.pop("x"), **given}
    program = capture(made(Named), given, roles={"images": "sample"})
    assert program.inputs[0].path == ("images", "*")
    same(program(**given), made(Named)(**given))


def test_images_of_one_call_may_differ_in_size_where_those_of_the_example_do() -> None:
    given = call(2)
    given["x"][1] = torch.randn(4, 6, 4)
    program = capture(made(), given)
    given["x"] = [torch.randn(4, 5, 4), torch.randn(4, 3, 4)]
    same(program(**given), made()(**given))


def test_compiled_on_noise(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    artifact = tfqc.compile(made(), EXACT, schedule=scheduler, steps=4, example_inputs=call(2))
    loaded = tfqc.load(artifact.save(tmp_path / "out"))
    for images in (1, 3):
        same(loaded(**call(images)), made()(**call(images)))


def test_compiled_on_recorded_calls_of_several_images(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    calls = [call(3, seed, t) for seed in range(4) for t in (999, 749, 499, 249)]
    given: dict[str, Any] = {"schedule": scheduler, "steps": 4, "calibration": calls}
    from_model = tfqc.compile(made(), W8A8, example_inputs=call(2), **given)
    from_program = tfqc.compile(capture(made(), call(2)), W8A8, **given)
    assert from_model.texts["program.ir"] == from_program.texts["program.ir"]
    got = tfqc.load(from_model.save(tmp_path / "out"))(**call(2))
    for image, wanted in zip(got[0], made()(**call(2))[0], strict=True):
        assert float((image - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"texts": call(3)["texts"]}, "texts has 3 entries for 2 images: give one for each"),
        ({"x": [], "texts": []}, "x is an empty list: give an entry for each image"),
        ({"x": call(2, sizes=(4, 5))["x"]}, r"x\.\* is 1x4x4x5; this model takes 1x4x4x4"),
        ({"t": torch.ones(3)}, "t has 3 timesteps for"),
    ],
)
def test_calls_that_do_not_fit(change: dict[str, Any], sentence: str) -> None:
    program = capture(made(), call(2))
    with pytest.raises(ValueError, match=sentence):
        program(**call(2) | change)


def test_images_that_hang_on_each_other_are_refused() -> None:
    with pytest.raises(CaptureError, match="does not compute the images of x, texts each by itself"):
        capture(made(Together), call(2))


def test_a_call_that_lacks_a_list() -> None:
    calls = [{name: value for name, value in call(2).items() if name != "texts"}]
    with pytest.raises(CalibrationError, match=r"calibration\[0\] has no 'texts\.\*'"):
        tfqc.compile(capture(made(), call(2)), W8A8, schedule=[749.0], calibration=calls)
