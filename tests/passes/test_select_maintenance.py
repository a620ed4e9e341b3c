"""select-maintenance: what is chosen, from disturbances that are written by hand."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers import features
from tests.subjects import Subjects, assert_text_round_trip
from tfqc.errors import PassError, PipelineError, SpecError
from tfqc.ir.program import Program, Stage
from tfqc.ir.render import render
from tfqc.ir.rows import Disturbance, Maintenance
from tfqc.passing.pipeline import Pipeline

STRATEGIES = ("tib", "cache4", "cache8")


def measured(program: Program, errors: dict[str, dict[str, list[float]]], sizes: dict[str, int]) -> Program:
    """`errors`: feature -> strategy -> error at each step; the others of the program's features copy the first."""
    nodes = [n.name for n in features(program)]
    given = list(errors.values())
    rows = {}
    for number, name in enumerate(nodes):
        e = given[min(number, len(given) - 1)]
        rows[name] = Disturbance(
            (951.0, 701.0, 421.0, 37.0),
            {s: tuple(1 - v for v in e[s]) for s in e},
            {s: tuple(10 - v for v in e[s]) for s in e},  # the other metric prefers the opposite
            {s: (0,) * 4 for s in e},
            sizes,
        )
    program.set_table(Disturbance, rows)
    return program


ERRORS = {
    "a": {"tib": [0.1, 0.5, 0.5, 0.5], "cache4": [0.3, 0.3, 0.3, 0.3], "cache8": [0.4, 0.2, 0.2, 0.4]},
    "b": {"tib": [0.1, 0.1, 0.1, 0.9], "cache4": [0.6, 0.6, 0.6, 0.2], "cache8": [0.7, 0.7, 0.7, 0.7]},
    "c": {"tib": [0.1, 0.1, 0.1, 0.1], "cache4": [0.6, 0.6, 0.6, 0.2], "cache8": [0.7, 0.7, 0.7, 0.7]},
}
SIZES = {"tib": 10, "cache4": 40, "cache8": 80}


@pytest.fixture
def program(subject: Subjects) -> Program:
    """`chain` has three features."""
    return measured(subject("chain").program, ERRORS, SIZES)


def chosen(program: Program, options: str) -> list[tuple[str, ...]]:
    candidates = "" if "candidates" in options else f" candidates={','.join(STRATEGIES)}"
    Pipeline.parse(f"select-maintenance{{strategy=auto {options}{candidates}}}").run(program)
    assert program.stage is Stage.ANALYZED
    rows = program.table(Maintenance)
    return [rows[n.name].strategy for n in features(program)]


@pytest.mark.parametrize(
    ("granularity", "want"),
    [
        ("feature", [("cache8",), ("tib",), ("tib",)]),
        ("feature-step", [("tib", "cache8", "cache8", "cache4"), ("tib", "tib", "tib", "cache4"), ("tib",)]),
        ("step", [("tib", "tib", "tib", "cache4")] * 3),
        ("model", [("tib",)] * 3),
    ],
)
def test_granularities(granularity: str, want: list[tuple[str, ...]], program: Program) -> None:
    """b's errors with tib sum to 1.2, with cache4 to 2.0: worst at one step, best in the sum."""
    assert chosen(program, f"granularity={granularity}") == want


def test_the_other_metric(program: Program) -> None:
    assert chosen(program, "metric=relative-l2") == [("tib",), ("cache8",), ("cache8",)]


def test_candidates(program: Program) -> None:
    assert chosen(program, "candidates=cache4,cache8") == [("cache8",), ("cache4",), ("cache4",)]


@pytest.mark.parametrize("budget", [30, 59, 60, 99, 100, 129, 130, 240, 1000])
def test_budget(budget: int, program: Program) -> None:
    names = ("cache4", "cache8", "tib")
    got = chosen(program, f"budget={budget}")
    spent = sum(SIZES[s] for (s,) in got)
    assert spent <= budget
    loss = sum(sum(e[s]) for e, (s,) in zip(ERRORS.values(), got, strict=True))
    best = min(
        sum(sum(e[s]) for e, s in zip(ERRORS.values(), combination, strict=True))
        for combination in itertools.product(names, repeat=3)
        if sum(SIZES[s] for s in combination) <= budget
    )
    assert loss == pytest.approx(best)  # greedy finds the best here


def test_too_small_a_budget(program: Program) -> None:
    with pytest.raises(PassError, match=r"budget of 29 bytes is too small: the cheapest candidates take 30 bytes"):
        chosen(program, "budget=29")


@pytest.mark.parametrize("strategy", ["tib", "cache4", "cache8", "table", "fold"])
def test_one_for_all(strategy: str, subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run(f"select-maintenance{{strategy={strategy}}}")
    assert {r.strategy for r in program.table(Maintenance).values()} == {(strategy,)}
    assert len(program.table(Maintenance)) == len(features(program))
    assert_text_round_trip(program, its.call([951.0, 37.0]))


def test_unchanged_by_a_second_run(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run("select-maintenance")
    text = render(program)
    assert render(its.run("select-maintenance", program=program)) == text


def test_auto_takes_the_exact_one(subject: Subjects) -> None:
    its = subject("unet2d-scale-shift")
    program = its.run("measure-disturbance,select-maintenance{strategy=auto}")
    assert {r.strategy for r in program.table(Maintenance).values()} == {("fold",)}


def test_refusals(subject: Subjects) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"#1 .* needs the table 'disturbance', .*: put measure-disturbance before"):
        its.run("select-maintenance{strategy=auto}")
    with pytest.raises(PipelineError, match=r"#2 .* needs 'cache8' in .* has tib there: let #1 measure-disturbance"):
        its.run("measure-disturbance{strategies=tib},select-maintenance{strategy=auto candidates=tib,cache8}")
    with pytest.raises(SpecError, match=r"budget is spent per feature"):
        Pipeline.parse("select-maintenance{strategy=auto granularity=step budget=5}")
    with pytest.raises(SpecError, match=r"no strategy"):
        Pipeline.parse("select-maintenance{strategy=auto candidates=tip}")
    with pytest.raises(PipelineError, match=r"works below stage folded"):
        its.run("select-maintenance,fold-cache,select-maintenance")
