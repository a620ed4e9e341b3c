"""outline: a part of a program as a function of its own, and the program as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import find
from tests.lowered import example
from tests.subjects import of_example
from tests.tiny import INPUTS, tiny
from tfqc.analysis.outline import add_outlined, outline
from tfqc.errors import PassError
from tfqc.ir.program import STEP, TIME, Program, Role
from tfqc.ir.render import render
from tfqc.ir.verify import verify


def run(program: Program, graph: torch.fx.Graph, *inputs: Tensor) -> tuple[Tensor, ...]:
    return Program({STEP: graph}, program.tensors, program.inputs).module()(*inputs)


def test_the_program_is_as_it_was() -> None:
    program = tiny()
    text, types = render(program), dict(program.types)
    (linear,) = find(program, "aten.linear")[-1:]
    graph = outline(program, [linear], {Role.TIME})
    assert (render(program), program.types) == (text, types)
    assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["timestep"]
    (value,) = run(program, graph, INPUTS["timestep"])
    model_time = torch.nn.functional.linear  # what the model computes, by hand
    t = INPUTS["timestep"][:, None].float() / 1000
    hidden = torch.nn.functional.silu(model_time(t, *(program.tensors[f"time.0.{p}"] for p in ("weight", "bias"))))
    wanted = model_time(hidden, *(program.tensors[f"time.2.{p}"] for p in ("weight", "bias")))
    assert torch.allclose(value, wanted)


class Doubled(nn.Module):
    """The time path reads the size of a value of its own (2 B), and one that it has from the sample (B)."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time.float()[:, None] / 1000
        twice = torch.cat([t, t])
        both = self.time(twice) + torch.ones(twice.shape[0], 4)
        when = both[: x.shape[0]] + both[x.shape[0] :]
        return x + when[:, None]


def test_sizes_of_what_is_computed() -> None:
    its = of_example("doubled", example(Doubled, 3, 4))
    program = its.program
    (read,) = [n for n in program.step.nodes if n.name in program.tables["tib"]][-1:]
    graph = outline(program, [read], {Role.TIME})
    for times in (torch.tensor([7]), torch.tensor([7, 421, 3])):
        (value,) = run(program, graph, times)
        wanted = its.reference({"x": torch.zeros(len(times), 3, 4), "time": times})
        assert torch.allclose(value.reshape(len(times), -1), wanted[:, 0])
    folded = its.run("select-maintenance,fold-cache")
    for timesteps in ([951.0], [37.0, 951.0, 500.0]):
        call = its.call(timesteps)
        assert torch.allclose(folded(**call), its.reference(call), atol=1e-5)


def test_several_outputs_of_an_operation_with_several() -> None:
    program = tiny()
    (linear,) = find(program, "aten.linear")[-1:]
    chunk = program.insert(linear.next, torch.ops.aten.chunk.default, (linear, 2, 1))
    import operator

    halves = [program.insert(chunk.next, operator.getitem, (chunk, i)) for i in (1, 0)]
    graph = outline(program, [*halves, linear, linear], {Role.TIME})
    b, a, whole, again = run(program, graph, INPUTS["timestep"])
    assert torch.equal(torch.cat([a, b], 1), whole) and torch.equal(whole, again)


def test_nothing_and_a_parameter() -> None:
    program = tiny()
    assert run(program, outline(program, [], {Role.TIME}), INPUTS["timestep"]) == ()
    graph = outline(program, [program.node("timestep")], {Role.TIME})
    assert torch.equal(run(program, graph, INPUTS["timestep"])[0], INPUTS["timestep"])


def test_as_a_function_of_the_program() -> None:
    its = of_example("doubled", example(Doubled, 3, 4))
    program = its.program
    (read,) = [n for n in program.step.nodes if n.name in program.tables["tib"]][-1:]
    add_outlined(program, TIME, [read], {Role.TIME})
    verify(program)


def test_what_is_not_there() -> None:
    program = tiny()
    last = find(program, "aten.conv2d")[-1]
    with pytest.raises(PassError, match=r"%conv2d .* reads %sample, which is not there at that time"):
        outline(program, [last], {Role.TIME})
