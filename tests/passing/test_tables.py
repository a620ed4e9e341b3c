"""Tables that passes know nothing of: derived ones go with the first pass that rewrites, durable ones stay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from tests.passing.test_contracts import IMAGES, SAMPLED, recipe
from tests.subjects import assert_text_round_trip
from tests.tiny import INPUTS, make_pass, tiny
from tfqc.errors import PassError, PipelineError
from tfqc.ir.program import Program
from tfqc.ir.rows import BindingTime, Disturbance, Maintenance, Memory, Quantizer, RowSource, Schedule, Tib, Trajectory
from tfqc.ir.tables import Row, fact_name, row_kind
from tfqc.passing import Context
from tfqc.passing.order import tables_of
from tfqc.passing.pipeline import Pipeline


@row_kind
@dataclass(frozen=True)
class Note(Row):
    """What a plug-in noted about a node, for good."""

    table: ClassVar[str] = "test-note"
    inline: ClassVar[bool] = True
    durable: ClassVar[bool] = True
    text: str


@row_kind
@dataclass(frozen=True)
class Guess(Row):
    """What is true of the program as it was."""

    table: ClassVar[str] = "test-guess"
    text: str


def annotate(program: Program, ctx: Context) -> None:
    names = [n.name for n in program.nodes() if n.op == "call_function"]
    program.set_table(Note, {name: Note(f"was {name}") for name in names})
    program.set_table(Guess, {name: Guess(name) for name in names})


ANNOTATE = Pipeline((make_pass("annotate", annotate, provides=frozenset({Note, Guess})),))


@pytest.mark.parametrize("target", ["fake-quant{weights=8 activations=8}", "cpu-int8", "cuda-int4"])
def test_a_new_durable_table_goes_through_every_recipe(target: str, tmp_path: Path) -> None:
    default = recipe(target, "fold")
    pipeline = Pipeline(default.passes[:1]) + ANNOTATE + Pipeline(default.passes[1:])
    ctx = Context(schedule=SAMPLED, calibration=IMAGES, workdir=tmp_path)
    program = pipeline.run(tiny(), ctx)
    plain = default.run(tiny(), ctx)
    annotated = Pipeline(pipeline.passes[:2]).run(tiny(), ctx).table(Note)
    alive = {n.name for graph in program.functions.values() for n in graph.nodes}
    assert program.table(Note) == {name: row for name, row in annotated.items() if name in alive}
    assert 0 < len(program.table(Note)) < len(annotated)
    assert Guess.table not in program.tables
    del program.tables[Note.table]
    assert str(program) == str(plain)


def test_text_holds_it(tmp_path: Path) -> None:
    program = (Pipeline.parse("normalize") + ANNOTATE).run(tiny())
    assert_text_round_trip(program, INPUTS)
    assert {Note, Guess} <= tables_of(program)


def test_the_core_has_of_both() -> None:
    durable = {kind for kind in (BindingTime, Disturbance, Maintenance, Memory, Quantizer, RowSource, Schedule, Tib,
                                 Trajectory) if kind.durable}  # fmt: skip
    assert durable == {Disturbance, Trajectory, RowSource, Schedule}


def test_no_pass_removes_a_durable_table() -> None:
    def forget(program: Program, ctx: Context) -> None:
        del program.tables[Note.table]

    forgets = make_pass("forget", forget, preserves=frozenset[type[Row]]())
    with pytest.raises(PassError, match=r"^forget removed the table 'test-note', which is durable\."):
        (ANNOTATE + Pipeline((forgets,))).run(tiny())


def test_a_pass_may_make_a_durable_table_anew() -> None:
    program = (ANNOTATE + ANNOTATE).run(tiny())
    assert program.table(Note)


def test_columns_are_of_a_row_class() -> None:
    column = Disturbance.column("cache4")
    assert fact_name(column) == "disturbance.cache4" and fact_name(Disturbance) == "disturbance"
    needs = Pipeline((make_pass("needs", requires=frozenset({column, Tib})),))
    needs.check(tables=[Disturbance, column, Tib])
    with pytest.raises(PipelineError, match=r"needs 'cache4' in the table 'disturbance', which has cache8 there"):
        needs.check(tables=[Disturbance, Disturbance.column("cache8"), Tib])


def test_columns_of_a_program_are_those_of_all_rows() -> None:
    program, values = tiny(), {"fold": (1.0,), "tib": (0.5,)}
    one = Disturbance((7.0,), values, values, {"fold": (0,), "tib": (0,)}, {"fold": 4, "tib": 4})
    two = Disturbance((7.0,), {"fold": (1.0,)}, {"fold": (0.0,)}, {"fold": (0,)}, {"fold": 4})
    program.set_table(Disturbance, {"silu": one, "add": two})
    assert tables_of(program) == {Disturbance, Disturbance.column("fold")}
