"""Finding the first pass that moves the program's outputs further than it declares, and the values where it begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tfqc.errors import TfqcError
from tfqc.instruments.numerics import CheckNumerics, example_call, relative_error, tensors_of
from tfqc.ir.calls import written
from tfqc.ir.ops import op_name
from tfqc.ir.program import STEP, Program
from tfqc.passing.base import Pass
from tfqc.passing.instrument import Instrument


@dataclass(frozen=True)
class Culprit:
    """The first pass that broke what it declares.

    `error` is of the outputs, as `relative_error` gives it, beyond `allowed`. `nodes` are the values of @step, in
    order, that differ although all that they read agrees; `made` the operations among what they are computed from
    that the pass wrote or changed.
    """

    number: int
    name: str
    error: float
    allowed: float
    nodes: tuple[str, ...]
    made: tuple[str, ...]


class Found(TfqcError):
    """Ends the run at the pass that was looked for."""


class Bisect(Instrument):
    """Ends a pipeline with `Found` after the first pass whose outputs moved further than it declares."""

    def __init__(self, seed: int = 0) -> None:
        self.numerics = CheckNumerics(seed)
        self.culprit: Culprit | None = None

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        allowed = item.moves(previous)
        if allowed.kind == "lossy":
            return
        error, timestep = self.numerics.error(program, previous)
        if error <= allowed.tolerance:
            return
        nodes = differing(program, previous, timestep, allowed.tolerance, self.numerics.seed)
        made = tuple(f"{n} = {_call(program, n)}" for n in dict.fromkeys(_changed(program, previous, nodes)))
        self.culprit = Culprit(number, str(item), error, allowed.tolerance, nodes, made)
        raise Found(f"#{number} {item} moved the outputs by {error:.2e} relative, and declares {allowed.tolerance:g}.")


def differing(program: Program, previous: Program, timestep: float, tolerance: float, seed: int = 0) -> tuple[str, ...]:
    """Values of @step, in order, that both programs have by name and type, and that differ first."""
    names = [
        n.name
        for n in program.step.nodes
        if n.op == "call_function"
        and program.tensor_type(n) is not None
        and program.types[n.name] == previous.types.get(n.name)
        and previous.find(n.name, previous.step) is not None
    ]
    call = example_call(previous, seed, timestep)
    with torch.no_grad():
        want, got = (tensors_of(_probe(p, names)(**call)) for p in (previous, program))
    errors = dict(zip(names, map(relative_error, want, got), strict=True))
    bad = {name for name, error in errors.items() if error > tolerance}
    first = [name for name in names if name in bad and not (_sources(program.node(name), set(errors)) & bad)]
    return tuple(first)


def _probe(program: Program, names: list[str]) -> Program:
    """The program with values of @step for outputs."""
    probe = program.clone()
    output = next(n for n in probe.step.nodes if n.op == "output")
    output.args = (tuple(probe.node(name) for name in names),)
    return probe


def _sources(node: fx.Node, known: set[str]) -> set[str]:
    """The nearest values among `known` that a node is computed from."""
    found: set[str] = set()
    waiting, seen = list(node.all_input_nodes), set[fx.Node]()
    while waiting:
        source = waiting.pop()
        if source.name in known:
            found.add(source.name)
        elif source not in seen:
            seen.add(source)
            waiting += source.all_input_nodes
    return found


def _changed(program: Program, previous: Program, names: tuple[str, ...]) -> Iterator[str]:
    """Operations behind the named values, and they themselves, that were not there before, or were others."""
    for name in names:
        waiting = [program.node(name)]
        seen: set[fx.Node] = set()
        while waiting and len(seen) < 64:
            node = waiting.pop()
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            old = previous.find(node.name, previous.step)
            if old is None or _written(old) != _written(node):
                yield node.name
            if node.name == name or old is None:
                waiting += node.all_input_nodes


def _call(program: Program, name: str) -> str:
    return _written(program.node(name, STEP))


def _written(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    args, kwargs = written(node)
    return f"{op_name(node.target)}({', '.join([*map(str, args), *(f'{k}={v}' for k, v in kwargs.items())])})"
