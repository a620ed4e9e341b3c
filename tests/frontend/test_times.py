"""Forms of time: a number, one an image, in columns; what is no timestep is refused at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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


class Embedded(nn.Module):
    """The time is embedded by its caller."""

    def forward(self, sample: Tensor, temb: Tensor) -> Tensor:
        return sample + temb[:, :3, None, None]


@pytest.mark.parametrize(
    ("model", "call", "roles", "sentence"),
    [
        (Timed(8), {"sample": X, "timestep": torch.ones(2, 8)}, {}, r"timestep is 2x8 for 2 images: a timestep is one"),
        (Timed(), {"sample": X, "timestep": torch.ones(5)}, {}, r"timestep is 5 for 2 images"),
        (Embedded(), {"sample": X, "temb": torch.ones(2, 8)}, {"temb": "time"}, r"temb is 2x8 for 2 images"),
        (Embedded(), {"sample": X, "temb": torch.ones(2, 8)}, {}, r"No input has the role 'time': .*embeds it if that"),
    ],
)
def test_what_is_no_timestep_is_refused_at_the_door(
    model: nn.Module, call: dict[str, Any], roles: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr("torch.export.export", never)
    with pytest.raises(CaptureError, match=sentence):
        capture(model, call, roles=roles)


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
