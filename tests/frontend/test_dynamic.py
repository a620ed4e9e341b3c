"""Dimensions that may differ: how they are asked for, ranges, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.frontend.test_capture import Example
from tests.helpers import first
from tfqc.errors import CaptureError
from tfqc.frontend import capture
from tfqc.frontend.dynamic import DynamicDims
from tfqc.ir.parse import parse
from tfqc.ir.program import Role
from tfqc.ir.render import render


@pytest.mark.parametrize("asked", ["H,W", "H, W", "sample[2]=H,sample[-1]=W", {"sample": {2: "H", 3: "W"}}])
def test_every_way_to_ask_is_the_same(asked: DynamicDims, example: Callable[[str], Example]) -> None:
    model, inputs = example("unet-sd")
    assert capture(model, inputs, dynamic=asked).input(Role.SAMPLE)[0].type.shape == ("B", 4, "H", "W")


def test_a_range_is_a_guard(example: Callable[[str], Example]) -> None:
    model, inputs = example("unet-sd")
    program = capture(model, inputs, dynamic="H:8..16,W")
    assert program.guards == ("H % 2 == 0", "W % 2 == 0", "H >= 8", "H <= 16")
    assert parse(render(program), program.tensors).guards == program.guards

    def called(height: int) -> torch.Tensor:
        return first(program(**{**inputs, "sample": torch.zeros(2, 4, height, 4)}))

    assert called(16).shape == (2, 4, 16, 4)
    for height in (6, 18):
        with pytest.raises(ValueError, match=r"takes Bx4xHxW with H even and W even and H >= 8 and H <= 16"):
            called(height)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("h", "'h' is no name for a dimension: use capital letters"),
        ("H=4", "'H=4' is no dimension that may differ: write H,W for"),
        ("H:9..4", "'H:9..4' leaves no size"),
        ("F", r"sample has no dimension that is called F: it is \[2, 4, 8, 8\] \(B, C, H, W\)"),
        ("C", r"no dimension that is called C"),
        ("noise[1]=S", "There is no input 'noise' with dynamic dimensions"),
        ("sample[4]=S", r"sample has no dimension 4: it is \[2, 4, 8, 8\]"),
        ("H:16..32", r"H is 8 in the example inputs, out of 16\.\.32: give an example within the range"),
    ],
)
def test_refused(asked: str, sentence: str, example: Callable[[str], Example]) -> None:
    model, inputs = example("unet-sd")
    with pytest.raises(CaptureError, match=sentence):
        capture(model, inputs, dynamic=asked)
