"""prepack-weights: the same codes, in tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find
from tests.lowered import W8, apply, before, example, parts, round_trip
from tests.subjects import of_example
from tfqc.errors import PipelineError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.runtime.packing import pack_int4
from tfqc.runtime.tiles import pack, sums

W4 = "calibrate-weights{method=min-max bits=4 edge-bits=8}"


def unpacked(program: Program) -> dict[str, tuple[object, ...]]:
    """Of each product: the names of tiles and sums, and what is known of them."""
    found = {}
    for node in [*find(program, "tfqc.qlinear"), *find(program, "tfqc.qconv")]:
        weight = args_of(node)[4]
        assert weight.target is torch.ops.tfqc.unpack_tiles.default  # type: ignore[union-attr]
        found[node.name] = tuple(a.target if hasattr(a, "target") else a for a in args_of(weight))  # type: ignore[union-attr]
    return found


def test_bytes() -> None:
    its = parts()
    old = before("prepack-weights", its)
    program = apply("prepack-weights", old)
    found = unpacked(program)
    assert len(found) == 13
    assert found["mul_3"] == ("wide.weight.pairs", "wide.weight.pairs.sums", [64, 16], 1, True, 8)
    assert found["conv2d_3"] == ("grow.weight.tiles", "grow.weight.tiles.sums", [16, 8, 3, 3], 2, False, 8)
    assert not any(name.endswith("codes") for name in program.tensors)
    for name, groups, paired in (("wide", 1, True), ("grow", 2, False), ("out", 1, False), ("conv_in", 1, False)):
        codes = old.tensors[f"{name}.weight.codes"]
        stored = f"{name}.weight.{'pairs' if paired else 'tiles'}"
        assert torch.equal(program.tensors[stored], pack(codes, groups, paired))
        assert torch.equal(program.tensors[f"{stored}.sums"], sums(codes, groups, paired))
    round_trip(its, program)


def test_two_codes_a_byte() -> None:
    its = parts()
    old = before("prepack-weights", its, "cpu-int8{weights=4}", W4)
    program = apply("prepack-weights{bits=4}", old)
    found = unpacked(program)
    assert {k for k, v in found.items() if v[5] == 8} == {"silu", "conv2d_4"}  # the first and the last: 8 bits
    tiles = program.tensors["wide.weight.pairs4"]
    assert tiles.dtype is torch.uint8
    assert torch.equal(tiles, pack_int4(pack(old.tensors["wide.weight.codes"], 1, True)))
    round_trip(its, program)
    assert {v[5] for v in unpacked(apply("prepack-weights{bits=8}", old)).values()} == {8}


class Tied(nn.Module):
    """One weight in two products, of which one ends in GEGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.wide, self.narrow = nn.Linear(1, 32), nn.Linear(32, 64), nn.Linear(32, 32)
        self.last = nn.Linear(64, 32)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        value, gate = self.wide(x + self.time(time.float()[:, None] / 1000)[:, None]).chunk(2, dim=-1)
        return self.last(self.wide(self.narrow(value * F.gelu(gate))))


TIED = example(Tied, 3, 32)


def test_one_weight_in_two_orders() -> None:
    its = of_example("tied", TIED)
    program = apply("prepack-weights", before("prepack-weights", its))
    wide = [v for v in unpacked(program).values() if str(v[0]).startswith("wide")]
    assert sorted((v[0], v[4]) for v in wide) == [("wide.weight.pairs", True), ("wide.weight.tiles", False)]
    round_trip(its, program)


def test_without_weights() -> None:
    """On the meta device, as it is with them."""
    program = before("prepack-weights", parts())
    meta = program.clone()
    meta.tensors = {name: t.to("meta") for name, t in program.tensors.items()}
    assert render(parts().run("prepack-weights", program=meta)) == render(apply("prepack-weights", program))


def test_unchanged() -> None:
    floats = before("prepack-weights", parts(), activations="")
    assert render(apply("prepack-weights", floats)) == render(floats)
    done = apply("prepack-weights", before("prepack-weights", parts(), weights=W8))
    assert render(apply("prepack-weights", done)) == render(done)


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("prepack-weights")
