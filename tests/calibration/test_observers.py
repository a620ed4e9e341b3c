"""Observers: what they find, in one piece or in parts that travel, and how little memory they take for it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tfqc.calibration.observers import moments
from tfqc.calibration.observers.base import Observer, State
from tfqc.calibration.observers.moments import Moments, steps_looked_at
from tfqc.calibration.observers.ranges import Ranges
from tfqc.calibration.observers.samples import Samples
from tfqc.errors import CalibrationError
from tfqc.quant.grid import Grid

STEPS = 3
CONV = {"kernel": (3, 2), "geometry": ((2, 1), (1, 2), (1, 2))}


def images(count: int = 6, *shape: int) -> torch.Tensor:
    return torch.randn(count, *(shape or (4, 7, 9)), generator=torch.Generator().manual_seed(count))


def makers() -> list[Observer[Any]]:
    return [
        Ranges(STEPS),
        Ranges(STEPS, 50),
        Moments(9),
        Moments(24, **CONV, steps=frozenset({0, 2})),
        Samples(9, (), (), frozenset({0, 2})),
        Samples(24, **CONV, steps=frozenset({1})),
    ]


def observed(empty: Observer[Any], batch: int, values: torch.Tensor) -> Observer[Any]:
    """An observer of one batch; what is seen differs from step to step."""
    own = empty.fresh(batch)
    for step in range(STEPS):
        own.update(values * (step + 1), step)
    return own


def travelled(observer: Observer[Any], file: Path) -> Observer[Any]:
    """The observer as another process has it."""
    state = observer.state()
    save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, file)
    return type(observer).from_state(State(load_file(file), json.loads(json.dumps(state.facts))))


def same(a: Observer[Any], b: Observer[Any]) -> bool:
    one, other = a.state(), b.state()
    tensors = one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )
    return tensors and json.dumps(one.facts) == json.dumps(other.facts) and a.key == b.key


@pytest.mark.parametrize("which", range(6))
def test_batches_that_travel_give_the_same_bytes(which: int, tmp_path: Path) -> None:
    """Three batches, run in another order and sent as files, merged in the order of batches."""
    empty = makers()[which]
    parts = list(enumerate(images().split(2)))
    one = observed(empty, *parts[0])
    for part in parts[1:]:
        one.merge(observed(empty, *part))
    sent = {b: travelled(observed(empty, b, x), tmp_path / f"{b}.safetensors") for b, x in reversed(parts)}
    for batch in (1, 2):
        sent[0].merge(sent[batch])
    assert same(one, sent[0])
    assert same(travelled(one, tmp_path / "all.safetensors"), one)
    assert not same(one, observed(empty, *parts[0]))
    # What goes on from a saved state is what would have gone on without.
    more = images(2)
    one.merge(observed(empty, 3, more))
    sent[0].merge(observed(empty, 3, more))
    assert same(one, sent[0])


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6])
def test_ranges_are_those_of_every_split(sizes: list[int]) -> None:
    x = images()
    parts = [observed(Ranges(STEPS), batch, part) for batch, part in enumerate(x.split(sizes))]
    for part in parts[1:]:
        parts[0].merge(part)
    scale, zero_point = parts[0].finish().qparams(Grid(8, False), "min-max", True, 0)
    whole = observed(Ranges(STEPS), 0, x).finish().qparams(Grid(8, False), "min-max", True, 0)
    assert torch.equal(scale, whole[0]) and torch.equal(zero_point, whole[1])
    assert scale.shape == (STEPS,) and scale[0] < scale[1] < scale[2]


def test_values_are_drawn_alike_from_all_batches() -> None:
    own = [Ranges(1, 300).fresh(batch) for batch in range(4)]
    for batch, observer in enumerate(own):
        observer.update(torch.full((1000,), float(batch)), 0)
        if batch:
            own[0].merge(observer)
    counts = torch.bincount(own[0].finish().steps[0].values.int())
    assert len(counts) == 4 and counts.sum() == 300 and counts.min() > 45 and counts.max() < 110


def test_without_measuring_a_range_is_there() -> None:
    scale, _ = Ranges(STEPS, 50).unknown().qparams(Grid(4, False), "mse", True, 0)
    assert scale.shape == (STEPS,)
    assert Moments(5).unknown().is_meta


def test_what_has_no_range_is_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        Ranges(1).update(torch.tensor([1.0, torch.inf]), 0)


GEOMETRIES = [
    ((k1, k2), ((s, 1), (p, 2), (d, 1)))
    for (k1, k2), s, p, d in itertools.product([(3, 3), (1, 2)], [1, 2], [0, 1], [1, 2])
]


@pytest.mark.parametrize(("kernel", "geometry"), GEOMETRIES)
@pytest.mark.parametrize("tile", [1 << 22, 300, 1])
def test_moments_of_a_convolution(
    kernel: tuple[int, int], geometry: tuple[tuple[int, int], ...], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the unfolded input, in whatever tiles it is laid out."""
    monkeypatch.setattr(moments, "TILE", tile)
    monkeypatch.setattr(moments, "STRIP", 5)
    x = images(3, 4, 9, 8)
    stride, padding, dilation = geometry
    rows = F.unfold(x.double(), kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    found = Moments(4 * kernel[0] * kernel[1], kernel, geometry)
    found.update(x, 0)
    assert found.state().facts["rows"] == len(rows)
    torch.testing.assert_close(found.finish(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_moments_of_a_linear() -> None:
    x = images(5, 3, 300)  # more columns than a strip has
    found = Moments(300)
    found.update(x, 0)
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(found.finish(), rows.T @ rows / 15, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.finish(), found.finish().T)


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that any operation's result lies in."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return out


def test_no_unfolded_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the input, an update makes a tile, a strip of H, and one image's padded input."""
    monkeypatch.setattr(moments, "TILE", 20_000)
    monkeypatch.setattr(moments, "STRIP", 16)
    x = images(8, 16, 32, 32)
    unfolded = 16 * 9 * x[:, 0].numel() * 4
    found = Moments(16 * 9, (3, 3), ((1, 1), (1, 1), (1, 1)))
    found.update(x[:1], 0)  # H itself is there
    with Largest(x, found.state().tensors["sum"]) as largest:
        found.update(x, 1)
    assert 0 < largest.bytes <= max(20_000 * 4, 16 * 34 * 34 * 4) < unfolded / 50


@pytest.mark.parametrize(
    ("count", "looks", "want"),
    [(4, 20, {0, 1, 2, 3}), (10, 20, set(range(10))), (9, 3, {0, 4, 8}), (5, 1, {0}), (1, 20, {0})],
)
def test_steps_are_looked_at_from_the_first_to_the_last(count: int, looks: int, want: set[int]) -> None:
    assert steps_looked_at(count, looks) == want
