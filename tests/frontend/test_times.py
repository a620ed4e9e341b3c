"""Forms of time: a number, one an image, in columns; others are computed with at each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from tfqc import compile, load
from tfqc.errors import CaptureError
from tfqc.frontend import capture
from tfqc.ir.parse import parse
from tfqc.ir.program import Role
from tfqc.ir.render import render

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


class Timed(nn.Module):
    """A linear of sines of the time, added to an image; `shape` is how it wants its time."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.embed, self.conv = shape, nn.Linear(4, 3), nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.dim() == 1 + len(self.shape)
        time = timestep.reshape(-1, 1) * torch.tensor([1.0, 0.1, 0.01, 0.001])
        return self.conv(sample) + self.embed(time.sin())[:, :, None, None]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_a_time_may_have_dimensions_of_one(shape: tuple[int, ...]) -> None:
    model = Timed(*shape).eval()
    call = {"sample": X, "timestep": torch.full((2, *shape), 500.0)}
    program = capture(model, call)
    assert program.input(Role.TIME)[0].type.shape == ("B",)
    again = parse(render(program), program.tensors)
    for images in (1, 2):
        one = {"sample": X[:images], "timestep": torch.full((images, *shape), 40.5)}
        torch.testing.assert_close(again(**one), model(**one), rtol=0, atol=0)


def test_a_time_in_columns_is_folded(tmp_path: Path) -> None:
    model = Timed(1).eval()
    call = {"sample": X, "timestep": torch.full((2, 1), 500.0)}
    artifact = compile(
        model, "fake-quant{weights=none activations=none}", schedule=[900.0, 500.0, 0.25], example_inputs=call
    )
    assert "table_read" in artifact.texts["program.ir"]
    artifact.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    for time in (900.0, 0.25, 77.0):  # the last has no row
        one = {"sample": X, "timestep": torch.full((2, 1), time)}
        torch.testing.assert_close(loaded(**one), model(**one), rtol=1e-5, atol=1e-6)


class Beside(nn.Module):
    """What comes in as a time is added to the images by a linear: to each its own, or of all the mean; `timestep` is
    embedded."""

    def __init__(self, width: int, each: bool) -> None:
        super().__init__()
        self.timed, self.mix, self.each = Timed(), nn.Linear(width, 3), each

    def forward(self, sample: Tensor, times: Tensor, timestep: Tensor | None = None) -> Tensor:
        mixed = self.mix(times.reshape(-1, times.shape[-1]) * 0.002).sin()
        sample = sample + (mixed if self.each else mixed.mean(0, keepdim=True))[:, :, None, None]
        return sample if timestep is None else self.timed(sample, timestep)


@pytest.mark.parametrize(
    ("call", "roles"),
    [
        ({"times": torch.full((2, 4), 500.0)}, {"times": "time"}),  # a time for each frame
        ({"times": torch.full((2, 1, 4), 500.0)}, {"times": "time"}),
        ({"times": torch.rand(2, 8)}, {}),  # embedded by the caller
        ({"times": torch.tensor([600.0, 300.0, 0.0])}, {"times": "time"}),  # as many as there are kinds of tokens
        (
            {"times": torch.full((2, 1), 250.0), "timestep": torch.full((2,), 500.0)},
            {"times": "time", "timestep": "time"},
        ),
        (
            {"times": torch.full((2, 4), 250.0), "timestep": torch.full((2,), 500.0)},
            {"times": "time", "timestep": "time"},
        ),
    ],
)
@pytest.mark.parametrize("target", ["fake-quant{weights=none activations=none}", "cpu-int8"])
def test_times_that_no_table_has_rows_for_are_computed_with(
    call: dict[str, Tensor], roles: dict[str, str], target: str, tmp_path: Path
) -> None:
    model = Beside(call["times"].shape[-1], each=len(call["times"]) == 2).eval()
    artifact = compile(
        model,
        target,
        schedule=DDIMScheduler(),
        steps=3,
        example_inputs={"sample": X, **call},
        roles=roles,
        calibration=2,
    )
    artifact.save(tmp_path / "out")
    loaded, rough = load(tmp_path / "out"), "cpu" in target
    largest = max(float(call[name].max()) for name in call)
    for t in (666.0, 333.0, 0.0) if rough else (666.0, 500.0, 400.0, 300.0, 200.0, 0.0):  # rows are added, or not
        factor = t / largest if roles else 1.0
        one = {"sample": X * t / 666, **{name: value * factor for name, value in call.items()}}
        torch.testing.assert_close(loaded(**one), model(**one), rtol=0, atol=0.1 if rough else 1e-5)
    assert ("known at compile time" in " ".join(artifact.facts["report"])) is ("timestep" in call)


def test_an_input_that_may_be_the_time_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr("torch.export.export", never)
    with pytest.raises(CaptureError, match=r"No input has the role 'time', and times may be it: .*'times': 'request'"):
        capture(Beside(1, each=True), {"sample": X, "times": torch.ones(2, 1)})


class Listed(nn.Module):
    """A sample in a list, text encoders' layers in a list, rotary embeddings in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.timed = Timed()

    def forward(
        self, x: list[Tensor], t: Tensor, layers: list[Tensor], rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        cos, sin = rotary if rotary is not None else (1.0, 0.0)
        return self.timed(x[0], t) * cos + (layers[0] - layers[1])[:, :, None, None] + sin


def test_inputs_in_lists_have_paths_and_roles() -> None:
    model = Listed().eval()
    layers, rotary = [torch.ones(2, 3), torch.zeros(2, 3)], (torch.ones(4, 4), torch.ones(4, 4))
    program = capture(model, {"x": [X], "t": torch.ones(2), "layers": layers, "rotary": rotary})
    assert [i.path for i in program.input(Role.SAMPLE)] == [("x", "0")]
    assert [(i.path, i.name) for i in program.input(Role.REQUEST)] == [
        (("layers", "0"), "layers_0"), (("layers", "1"), "layers_1"),
        (("rotary", "0"), "rotary_0"), (("rotary", "1"), "rotary_1"),
    ]  # fmt: skip
    call = {"x": (X[:1],), "t": torch.ones(1), "layers": tuple(e[:1] for e in layers), "rotary": list(rotary)}
    torch.testing.assert_close(program(**call), model(**call), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"needs the input 'layers\.1'"):
        program(**{**call, "layers": [layers[0][:1]]})


class Timeless(nn.Module):
    """Told no time: an image, or tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(7, 4) if tokens else nn.Identity(), nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        embedded = self.embed(sample)
        return self.conv(embedded) * text[:, :, None, None]


@pytest.mark.parametrize("target", ["fake-quant{weights=none activations=none}", "fake-quant", "cpu-int8"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("schedule", [None, DDIMScheduler()])
def test_a_model_that_is_told_no_time_needs_no_schedule(
    target: str, tokens: bool, schedule: Any, tmp_path: Path
) -> None:
    model = Timeless(tokens).eval()
    sample = torch.randint(0, 7, (2, 3, 4), generator=torch.Generator().manual_seed(0)) if tokens else X
    example = {"sample": sample, "text": torch.ones(2, 3)}
    steps = None if schedule is None else 3
    artifact = compile(model, target, schedule=schedule, steps=steps, example_inputs=example, calibration=3)
    artifact.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    for images in (2, 1, 3):
        call = {"sample": sample.repeat(2, *[1] * (sample.dim() - 1))[:images], "text": torch.rand(images, 3)}
        close = 1e-5 if "none" in target else 0.1
        torch.testing.assert_close(loaded(**call), model(**call), rtol=0, atol=close)
    assert "Timeless is told no time" in " ".join(artifact.facts["report"])


def test_a_table_that_torch_reads_gets_rows_for_unknown_times(tmp_path: Path) -> None:
    model = Beside(1, each=True).eval()  # which adds a time to images: cpu-int8 has no kernel for that
    example = {"sample": X, "times": torch.full((2, 1), 500.0), "timestep": torch.full((2,), 500.0)}
    options: dict[str, Any] = {
        "example_inputs": example,
        "roles": {"times": "time", "timestep": "time"},
        "calibration": 2,
    }
    artifact = compile(model, "cpu-int8", schedule=DDIMScheduler(), steps=3, **options)
    artifact.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    for t in range(640, 700, 4):
        call = {"sample": X, "times": torch.full((2, 1), float(t)), "timestep": torch.full((2,), float(t))}
        torch.testing.assert_close(loaded(**call), model(**call), rtol=0, atol=0.2)
