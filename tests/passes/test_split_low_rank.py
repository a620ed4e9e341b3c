"""split-low-rank: the best factors of a rank beside each linear, and what they leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import find
from tests.lowered import apply, example, parts, round_trip
from tests.subjects import of_example
from tfqc.errors import PipelineError, SpecError
from tfqc.ir.render import render
from tfqc.passes.split_low_rank import low_rank
from tfqc.passing.pipeline import Pipeline

RANK = 16


class Branches(nn.Module):
    """Two linears of one value, one of another, one of time; and one that is no wider than a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.small = nn.Linear(1, 32), nn.Linear(32, 8)
        self.q, self.k, self.out = nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(24, 32)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = x + self.time(time.float()[:, None] / 1000)[:, None]
        mixed = self.out(self.q(h) * torch.sigmoid(self.k(h)))
        return mixed * self.small(mixed).mean(-1, keepdim=True)


BRANCHES = example(Branches, 5, 32)


def test_linears_of_one_value_share_what_goes_down() -> None:
    its = of_example("branches", BRANCHES)
    program = apply(f"split-low-rank{{rank={RANK}}}", its.program)
    shapes = {name: tuple(t.shape) for name, t in program.tensors.items() if name.endswith((".down", ".up", ".rest"))}
    assert shapes == {
        "q.weight.down": (32, RANK), "q.weight.up": (RANK, 24), "q.weight.rest": (24, 32),
        "k.weight.up": (RANK, 24), "k.weight.rest": (24, 32),
        "out.weight.down": (24, RANK), "out.weight.up": (RANK, 32), "out.weight.rest": (32, 24),
    }  # fmt: skip
    assert len(find(program, "aten.matmul")) == 2 + 3  # downs, ups
    assert {"time.weight", "small.weight"} < set(program.tensors)  # of time alone; of no more outputs than a rank
    for name, down in (("q", "q"), ("k", "q"), ("out", "out")):
        weight = its.model.get_parameter(f"{name}.weight")
        low, up, rest = (
            program.tensors[f"{n}.weight.{part}"] for n, part in ((down, "down"), (name, "up"), (name, "rest"))
        )
        assert torch.equal(low.half().float(), low) and torch.equal(up.half().float(), up)  # f16 holds them
        assert torch.equal(rest, weight - (low @ up).T)
    round_trip(its, program)


def test_factors_are_the_best_of_their_rank() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    down, up = low_rank(weight, RANK)
    best = torch.linalg.svdvals(weight.double())[RANK:].norm()
    assert best <= (weight.double() - (down.double() @ up.double()).T).norm() <= 1.001 * best


def test_narrow_linears_are_left_alone() -> None:
    program = parts().program
    assert render(apply("split-low-rank{rank=64}", program)) == render(program)


def test_what_it_refuses() -> None:
    for rank in (0, 24, 144):
        with pytest.raises(SpecError, match="multiples of 16"):
            Pipeline.parse(f"split-low-rank{{rank={rank}}}")
    its = of_example("branches", BRANCHES)
    late = Pipeline.parse("select-maintenance,calibrate-weights,split-low-rank")
    with pytest.raises(PipelineError, match="split-low-rank"):
        late.run(its.program, its.context())
