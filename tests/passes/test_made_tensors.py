"""Tensors that passes make: of tied weights, and beside tensors of the model that have such names already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lowered import context, example
from tests.subjects import Subject, of_example
from tfqc.codegen.target import Target
from tfqc.instruments import Instrument, VerifyEach
from tfqc.ir.program import Program
from tfqc.ir.types import TensorType
from tfqc.passing.pipeline import Pipeline


class Tied(nn.Module):
    """Weights that are read twice: with other inputs, in the time path too, and as a matrix and a row of numbers.

    `tied=False` computes the same from copies.
    """

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.time, self.a, self.c, self.last = nn.Linear(1, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.first, self.second, self.matrix = self.a, self.a, self.c.weight
        if not tied:
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            for copy in (self.first, self.second):
                copy.load_state_dict(self.a.state_dict())
            self.matrix = nn.Parameter(self.c.weight.detach().clone())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        when = self.first(F.silu(self.time(time.float()[:, None] / 1000)))
        h = x + when[:, None]
        h = self.second(F.relu(self.a(h) + self.c(h)))
        return self.last(h @ self.matrix + h * self.matrix[3])


def of(tied: bool) -> Subject:
    return of_example(f"tied-{tied}", example(lambda: Tied(tied), 5, 32))


TARGETS = (
    "fake-quant{weights=4 activations=8}",
    "fake-quant{weights=8 activations=8 mode=per-token group=16}",
    "cpu-int8{residual=fp32}",
    "cpu-int8{weights=4}",
    "cuda-int4{mode=w4a8 rank=16 edges=none}",
    "cuda-int4{mode=w4a16 rank=16}",
)


def through(
    program: Program, its: Subject, target: str, strategy: str, where: Path, *watch: Instrument, joint: bool = True
) -> Program:
    """The recipe of a target, to the program that it emits; `joint=False` without GPTQ, which rounds a tied weight once
    for the inputs of all of its readers, and each copy for those of its own."""
    parsed = Target.parse(target)
    text = parsed.backend.pipeline(parsed.options, strategy).removeprefix("normalize,discover-tib,")
    text = text if joint else text.replace("reconstruct-weights,", "")
    passes = Pipeline.parse(text) + Pipeline(parsed.backend.legalize(parsed.options))
    return passes.run(program, context(its, where), [VerifyEach(), *watch])


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("target", TARGETS)
def test_tied_weights_are_as_good_as_copies(target: str, tmp_path: Path) -> None:
    tied, untied = of(True), of(False)
    assert len(tied.discovered.tensors) < len(untied.discovered.tensors)
    for strategy, joint in (("tib", False), ("fold", False), ("fold", True)):
        one = through(tied.program, tied, target, strategy, tmp_path / "tied", joint=joint)
        two = through(untied.program, untied, target, strategy, tmp_path / "untied", joint=joint)
        for timesteps in ([750.0], [0.0, 500.0]):
            call = tied.call(timesteps)
            with torch.no_grad():
                full = tied.reference(call)
                assert error(full, untied.reference(call)) == 0
                got, want = one(**call), two(**call)
                assert error(want, full) < 0.25
                assert error(got, full) < 1.3 * error(want, full) if joint else error(got, want) < 1e-5


def test_a_weight_split_for_two_values(tmp_path: Path) -> None:
    """`a` is read with h and with what follows from it: each value has factors of its own."""
    its = of(True)
    program = Pipeline.parse("split-low-rank{rank=16}").run(its.program)
    names = sorted(n for n in program.tensors if n.endswith(".rest"))
    assert len(names) == 5  # two of a, one of c, one of c as a matrix, one of the last
    call = its.call([750.0])
    assert error(program(**call), its.reference(call)) < 1e-5


class Names(Instrument):
    """Remembers every name that a tensor had behind any pass."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def after(self, program: Program, previous: Any, item: Any, number: int) -> None:
        self.seen |= set(program.tensors)


@pytest.mark.parametrize("strategy", ["tib+fsc", "cache8", "fold"])
@pytest.mark.parametrize("target", TARGETS)
def test_names_that_the_model_has_already(target: str, strategy: str, tmp_path: Path) -> None:
    """The model's own tensors, under every name that any pass of the recipe makes, come through as they were."""
    its, names = of(True), Names()
    plain = through(its.program, its, target, strategy, tmp_path / "plain", names)
    made = sorted(names.seen - set(its.discovered.tensors))
    program = its.program
    output = next(n for n in program.step.nodes if n.op == "output")
    value = output.args[0]
    for number, name in enumerate(made):
        held = 0.25 * (number % 3 + 1)
        program.tensors[name] = torch.full((1,), held)
        with program.step.inserting_before(program.node("linear")):
            decoy = program.step.create_node("get_attr", name, name=f"decoy_{number}")
        program.types[decoy.name] = TensorType(torch.float32, (1,))
        value = program.insert(output, torch.ops.aten.add.Tensor, (value, decoy))
        value = program.insert(output, torch.ops.aten.sub.Tensor, (value, held))  # so that images stay the same
    output.args = (value,)
    result = through(program, its, target, strategy, tmp_path / "decoys")
    assert len(made) > 5
    for timesteps in ([750.0], [0.0, 500.0]):
        call = its.call(timesteps)
        with torch.no_grad():
            assert torch.allclose(result(**call), plain(**call), atol=0.02)
