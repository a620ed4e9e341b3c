"""plan-memory: values that are needed at the same time do not share a buffer."""

from __future__ import annotations

import itertools

import pytest
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.helpers import args_of, find
from tests.lowered import EXACT, apply, before, example, parts, round_trip
from tests.subjects import Subjects, of_example
from tfqc.errors import PipelineError
from tfqc.ir.ops import is_view
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.rows import Memory

RESIDUAL = {"tfqc.qlinear.default": 9, "tfqc.qconv.default": 12, "tfqc.gated_add.default": 2}


def reads(node: fx.Node) -> set[fx.Node]:
    """All that read a value, itself or through views."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= {user} | (reads(user) if is_view(user) else set())
    return found


def source(value: fx.Node) -> fx.Node:
    """The value that a chain of views looks at."""
    return source(value.all_input_nodes[0]) if is_view(value) else value


def check(program: Program) -> int:
    """Hold a plan to what it must keep; the number of values that took the place of another."""
    rows = program.table(Memory)
    nodes = {n.name: n for n in program.step.nodes}
    order = {n: i for i, n in enumerate(program.step.nodes)}
    for name, row in rows.items():
        assert row.first == order[nodes[name]]
        assert row.last == max([row.first, *(order[n] for n in reads(nodes[name]))]), name
    buffers: dict[int, list[str]] = {}
    for name, row in rows.items():
        buffers.setdefault(row.buffer, []).append(name)
    for names in buffers.values():
        for old, new in itertools.pairwise(sorted(names, key=lambda n: rows[n].first)):
            assert rows[old].last == rows[new].first  # not read later than by what overwrites it
            node = nodes[new]
            residual = args_of(node)[RESIDUAL[str(node.target)]]
            assert isinstance(residual, fx.Node) and source(residual) is nodes[old]
            others = [source(n).name for n in node.all_input_nodes if n is not residual]
            assert old not in others
            assert program.types[new].dtype is program.types[old].dtype  # type: ignore[union-attr]
    return len(rows) - len(buffers)


@pytest.mark.parametrize("target", ["cpu-int8", EXACT])
def test_parts(target: str) -> None:
    its = parts()
    program = apply("plan-memory", before("plan-memory", its, target))
    assert check(program) > 0
    rows = program.table(Memory)
    assert rows["add_2"].buffer == rows["silu"].buffer  # behind its norm, nothing reads silu
    assert rows["add_4"].buffer == rows["add_3"].buffer
    assert rows["add_3"].buffer != rows["add_2"].buffer  # its residual is a view of add_2, which cat reads later
    assert rows["add_2"].last == rows["cat"].first
    ours = {n.name for n in find(program, "tfqc.q") if "quantize" not in str(n.target)}
    assert ours < set(rows) and "transpose" not in rows
    round_trip(its, program)


@pytest.mark.parametrize("name", ["unet-sd", "dit"])
def test_models(name: str, subject: Subjects) -> None:
    its = subject(name)
    program = apply("plan-memory", before("plan-memory", its))
    assert check(program) > 0
    round_trip(its, program)


class Twice(nn.Module):
    """Residuals that must stay: one that is read once more, one that is the product's own operand elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first = nn.Linear(1, 16), nn.Linear(16, 16)
        self.one, self.two, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x + self.time(time.float()[:, None] / 1000)[:, None])
        one = self.one(F.layer_norm(h, (16,))) + h
        two = self.two(F.layer_norm(one, (16,))) + h.transpose(0, 0)
        return self.last(F.layer_norm(two, (16,))) + one


TWICE = example(Twice, 4, 16)


def test_a_residual_that_is_read_later() -> None:
    its = of_example("twice", TWICE)
    program = apply("plan-memory", before("plan-memory", its, EXACT))
    check(program)
    rows = program.table(Memory)
    h, one, two, last = [rows[n.name].buffer for n in find(program, "tfqc.qlinear")]
    assert one != h and two == h and last == one
    round_trip(its, program)


def test_nothing_else_changes() -> None:
    chain = before("plan-memory", of_example("twice", TWICE), activations="")
    for node in [n for n in chain.nodes() if "tfqc.plain" in str(n.target)]:
        chain.replace(node, args_of(node)[0])  # type: ignore[arg-type]
    chain.prune()
    text = render(chain)
    planned = apply("plan-memory", chain)
    kernels = {"tfqc.norm.default", "tfqc.gated_add.default", "tfqc.map.default"}
    assert {str(planned.node(n).target) for n in planned.table(Memory)} <= kernels
    planned.tables.pop("memory")
    assert render(planned) == text


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("plan-memory")
