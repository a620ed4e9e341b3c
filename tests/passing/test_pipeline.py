"""Pipelines: refused before anything runs, run as written, and passes held to what they declare."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.passing.test_spec import OPTIONS, Options
from tests.tiny import INPUTS, Explode, make_pass, scale_output, tiny
from tfqc.errors import PassError, PipelineError, SpecError, TfqcError, VerifyError
from tfqc.instruments import Instrument
from tfqc.ir.edit import rewrite
from tfqc.ir.program import Program, Stage
from tfqc.ir.render import render
from tfqc.ir.rows import BindingTime, Tib
from tfqc.passing import Context, Pass
from tfqc.passing.pipeline import Pipeline

Run = Callable[[Program, Context], None]


def add_tib(program: Program, ctx: Context) -> None:
    program.set_table(Tib, {"silu": Tib("body")})


def add_binding(program: Program, ctx: Context) -> None:
    program.set_table(BindingTime, {"silu": BindingTime("step-static")})


class Everything(Options, Pass):
    """A pass with an option of each kind."""

    name: ClassVar[str] = "everything"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the registry know these passes and no others."""

    def know(*passes: Pass, broken: tuple[str, ...] = ()) -> None:
        classes = {item.name: type(item) for item in passes}

        def find(name: str) -> type[Pass]:
            if name not in classes:
                raise SpecError(f"{name} does not load")
            return classes[name]

        monkeypatch.setattr("tfqc.passing.known.pass_names", lambda: [*broken, *classes])
        monkeypatch.setattr("tfqc.passing.known.find_pass", find)
        monkeypatch.setattr("tfqc.passing.pipeline.find_pass", find)

    return know


def refused(pipeline: Pipeline, *arguments: Any) -> str:
    with pytest.raises(PipelineError) as error:
        pipeline.check(*arguments)
    return str(error.value)


NORMALIZE = make_pass("normalize", reaches=Stage.NORMALIZED)
DISCOVER = make_pass("discover", add_tib, needs=Stage.NORMALIZED, provides=frozenset({Tib}))
SELECT = make_pass("select", needs=Stage.NORMALIZED, requires=frozenset({Tib}), reaches=Stage.ANALYZED)
FOLD = make_pass("fold", needs=Stage.ANALYZED, preserves=frozenset({BindingTime}), reaches=Stage.FOLDED)


# -- text ----------------------------------------------------------------------------------------------------


@given(st.lists(OPTIONS, max_size=3))
def test_a_pipeline_reads_back_as_it_was_printed(options: list[Options]) -> None:
    pipeline = Pipeline(tuple(Everything(**vars(o)) for o in options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfqc.passing.pipeline.find_pass", {"everything": Everything}.__getitem__)
        assert Pipeline.parse(str(pipeline)) == pipeline
        assert Pipeline.parse(pipeline.to_yaml() if options else "") == pipeline


def test_the_built_in_passes_are_found_by_name() -> None:
    pipeline = Pipeline.parse("normalize,discover-tib")
    assert [item.name for item in pipeline.passes] == ["normalize", "discover-tib"]
    assert pipeline.check() is Stage.NORMALIZED
    with pytest.raises(SpecError, match=r"no pass 'normalise'\. Did you mean 'normalize'\?"):
        Pipeline.parse("normalise")


def test_pipelines_join() -> None:
    assert str(Pipeline((NORMALIZE,)) + Pipeline((DISCOVER, SELECT))) == "normalize,discover,select"


# -- refused before anything runs ----------------------------------------------------------------------------


def test_a_missing_stage_names_the_pass_that_reaches_it(known: Callable[..., None]) -> None:
    known(NORMALIZE, DISCOVER, SELECT, FOLD, broken=("broken",))
    assert refused(Pipeline((NORMALIZE, FOLD))) == (
        "#2 fold needs stage analyzed but the program is only normalized there: put select before it."
    )
    known(NORMALIZE, FOLD)
    assert refused(Pipeline((NORMALIZE, FOLD))).endswith("put a pass that reaches analyzed before it.")


def test_a_missing_table_names_the_pass_that_provides_it(known: Callable[..., None]) -> None:
    known(NORMALIZE, DISCOVER, SELECT, FOLD, broken=("broken",))
    assert refused(Pipeline((NORMALIZE, SELECT))) == (
        "#2 select needs the table 'tib', which is not there: put discover before it."
    )
    late = make_pass("late", requires=frozenset({Tib}))
    assert refused(Pipeline((FOLD, late)), Stage.ANALYZED, [Tib]) == (
        "#2 late needs the table 'tib', which #1 fold drops: put discover between them."
    )
    known(NORMALIZE)
    assert refused(Pipeline((NORMALIZE, SELECT))).endswith("no known pass provides it.")


def test_a_pass_that_comes_too_late_names_the_pass_that_it_must_precede(known: Callable[..., None]) -> None:
    early = make_pass("early", below=Stage.NORMALIZED)
    known(NORMALIZE, early)
    assert refused(Pipeline((NORMALIZE, early))) == (
        "#2 early works below stage normalized but the program is normalized there: put it before #1 normalize."
    )
    assert refused(Pipeline((early,)), Stage.FOLDED) == (
        "#1 early works below stage normalized but the program is folded there: start from an earlier program."
    )


def test_missing_data_is_named() -> None:
    pipeline = Pipeline((make_pass("calibrate", data=frozenset({"schedule"})),))
    assert pipeline.check() is Stage.CAPTURED  # without a context nothing is known about data
    assert refused(pipeline, Stage.CAPTURED, (), Context()) == "#1 calibrate needs a schedule: give one (schedule=...)."


def test_check_returns_the_final_stage() -> None:
    assert Pipeline((NORMALIZE, DISCOVER, SELECT, FOLD)).check() is Stage.FOLDED
    assert Pipeline(()).check(Stage.ANALYZED) is Stage.ANALYZED
    assert Pipeline((NORMALIZE,)).check(Stage.FOLDED) is Stage.FOLDED


def test_nothing_runs_when_the_order_cannot_work(known: Callable[..., None]) -> None:
    ran: list[str] = []
    first = make_pass("first", lambda program, ctx: ran.append("first"))
    known(first)

    class Watch(Instrument):
        def start(self, program: Program, pipeline: Pipeline) -> None:
            ran.append("watch")

    with pytest.raises(PipelineError):
        Pipeline((first, FOLD)).run(tiny(), instruments=[Watch()])
    assert ran == []


def test_an_order_that_would_work_if_sorted_is_refused_not_sorted(known: Callable[..., None]) -> None:
    known(NORMALIZE, DISCOVER)
    with pytest.raises(PipelineError, match="put normalize before it"):
        Pipeline((DISCOVER, NORMALIZE)).run(tiny())


# -- running -------------------------------------------------------------------------------------------------


def test_what_is_no_pass_is_refused() -> None:
    kind: Any = Explode
    with pytest.raises(PipelineError, match=r"Explode is the class of a pass: put Explode\(\) into the pipeline"):
        Pipeline((kind,))
    with pytest.raises(PipelineError, match="A str is no pass"):
        Pipeline(("normalize",))  # pyright: ignore[reportArgumentType]


def test_a_pass_that_returns_a_program_is_told_that_nobody_takes_it() -> None:
    with pytest.raises(PassError, match="copies returned a Program: passes change the program that they get"):
        Pipeline((make_pass("copies", lambda program, ctx: program.clone()),)).run(tiny())  # pyright: ignore[reportArgumentType]


def test_functions_are_given_by_name() -> None:
    graph: Any = tiny().step
    with pytest.raises(TfqcError, match="A graph is no function of the program, which are given by name: 'step'"):
        tiny().nodes(graph)
    with pytest.raises(PassError, match="has no function by a graph, but by name: it has @step"):
        rewrite(tiny(), [], graph)


def test_passes_run_in_the_order_in_which_they_are_written() -> None:
    order: list[str] = []

    def note(name: str) -> Pass:
        return make_pass(name, lambda program, ctx: order.append(name))

    Pipeline((note("c"), note("a"), note("b"), note("a"))).run(tiny())
    assert order == ["c", "a", "b", "a"]


def test_instruments_nest_around_a_pass() -> None:
    seen: list[str] = []

    class Watch(Instrument):
        def __init__(self, name: str) -> None:
            self.name = name

        def start(self, program: Program, pipeline: Pipeline) -> None:
            seen.append(f"{self.name} start")

        def before(self, program: Program, item: Pass, number: int) -> None:
            seen.append(f"{self.name} before {number}")

        def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
            seen.append(f"{self.name} after {number}")

        def finish(self, program: Program) -> None:
            seen.append(f"{self.name} finish")

    Pipeline((make_pass("p", lambda program, ctx: seen.append("run")),)).run(
        tiny(), instruments=[Watch("x"), Watch("y")]
    )
    assert seen == [
        "x start", "y start", "x before 1", "y before 1", "run", "y after 1", "x after 1", "y finish",
        "x finish",
    ]  # fmt: skip


def test_tables_that_are_not_preserved_are_dropped_and_dead_nodes_pruned() -> None:
    program = tiny()
    add_tib(program, Context())
    add_binding(program, Context())

    def cut(program: Program, ctx: Context) -> None:
        silu = program.node("silu")
        silu.replace_all_uses_with(silu.all_input_nodes[0])

    Pipeline((make_pass("cut", cut, preserves=frozenset({BindingTime})),)).run(program)
    assert program.tables == {"binding": {}}  # the row went with its node
    assert "silu" not in {n.name for n in program.nodes()}


def test_a_table_that_a_pass_provides_survives_though_not_preserved() -> None:
    program = tiny()
    add_tib(program, Context())
    pipeline = Pipeline((make_pass("again", add_tib, preserves=frozenset[Any](), provides=frozenset({Tib})),))
    assert set(pipeline.run(program).tables) == {"tib"}


def _drop_tib(program: Program, ctx: Context) -> None:
    del program.tables["tib"]


def _write_in_place(program: Program, ctx: Context) -> None:
    program.tensors["conv_in.bias"].mul_(1.0)


@pytest.mark.parametrize(
    ("run", "declared", "message"),
    [
        (add_binding, {}, "p made the table 'binding' without declaring it in `provides`."),
        (add_binding, {"preserves": frozenset[Any]()}, "p made the table 'binding' without declaring it"),
        (add_tib, {"provides": frozenset({BindingTime})}, "p declares that it provides the table 'binding'"),
        (_drop_tib, {}, "p declares that it preserves the table 'tib', and removed it."),
        (_drop_tib, {"preserves": frozenset({Tib})}, "p declares that it preserves the table 'tib'"),
        (_write_in_place, {}, "p changed tensor @conv_in.bias in place"),
    ],
)  # fmt: skip
def test_a_pass_is_held_to_what_it_declares(run: Run, declared: dict[str, Any], message: str) -> None:
    program = tiny()
    add_tib(program, Context())
    before = render(program)
    with pytest.raises(PassError) as error:
        Pipeline((make_pass("p", run, **declared),)).run(program)
    assert message in str(error.value)
    assert render(program) == before


def test_a_pass_may_drop_a_table_that_it_does_not_preserve() -> None:
    program = tiny()
    add_tib(program, Context())
    Pipeline((make_pass("p", _drop_tib, preserves=frozenset[Any]()),)).run(program)
    assert program.tables == {}


def test_a_pass_does_not_set_the_stage_itself() -> None:
    def claim(program: Program, ctx: Context) -> None:
        program.stage = Stage.LOWERED

    program = Pipeline((make_pass("p", claim, reaches=Stage.NORMALIZED),)).run(tiny(), instruments=[])
    assert program.stage is Stage.NORMALIZED


def test_a_failing_pass_leaves_the_program_as_it_was_before_it() -> None:
    program = tiny()
    done = scale_output(3.0)

    def boom(program: Program, ctx: Context) -> None:
        add_tib(program, ctx)
        program.tensors.clear()
        program.step.erase_node(next(n for n in program.step.nodes if n.op == "output"))
        raise KeyError("lost\nin detail")

    wanted = Pipeline((make_pass("good", done),)).run(tiny())
    with pytest.raises(PassError) as error:
        Pipeline((make_pass("good", done), make_pass("bad", boom))).run(program)
    assert str(error.value).startswith("Pass #2 bad failed: KeyError: ")
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, KeyError)
    assert re.search(r"^in pass #2 bad, at .*test_pipeline\.py:\d+ in boom$", error.value.notes[0])
    assert render(program) == render(wanted)
    assert torch.equal(program(**INPUTS)[0], wanted(**INPUTS)[0])


def test_an_error_for_the_user_keeps_its_type_and_says_where() -> None:
    def refuse(program: Program, ctx: Context) -> None:
        raise VerifyError("No.", "first note")

    with pytest.raises(VerifyError) as error:
        Pipeline((make_pass("p", refuse),)).run(tiny())
    assert str(error.value) == "No."
    assert error.value.notes == ["first note", "in pass #1 p"]


def test_the_verifier_runs_by_default() -> None:
    def untype(program: Program, ctx: Context) -> None:
        del program.types["silu"]

    program = tiny()
    with pytest.raises(VerifyError, match=r"after #1 p: %silu .* has no type"):
        Pipeline((make_pass("p", untype),)).run(program)
    assert "silu" in program.types


def test_an_interrupt_restores_the_program_and_finishes_the_instruments() -> None:
    finished: list[str] = []

    class Watch(Instrument):
        def finish(self, program: Program) -> None:
            finished.append("finish")

        def failed(self, *_: Any, **__: Any) -> list[str]:  # type: ignore[override]
            finished.append("failed")
            return []

    def interrupt(program: Program, ctx: Context) -> None:
        add_tib(program, ctx)
        raise KeyboardInterrupt

    program = tiny()
    with pytest.raises(KeyboardInterrupt):
        Pipeline((make_pass("p", interrupt),)).run(program, instruments=[Watch()])
    assert program.tables == {}
    assert finished == ["finish"]


def test_an_instrument_that_fails_over_a_failure_does_not_hide_it() -> None:
    class Clumsy(Instrument):
        def failed(self, *_: Any, **__: Any) -> list[str]:  # type: ignore[override]
            raise OSError("disk full")

    with pytest.raises(PassError, match="Pass #1 explode failed: KeyError: 'here'") as error:
        Pipeline((Explode("here"),)).run(tiny(), instruments=[Clumsy()])
    assert "Clumsy failed in turn: disk full" in error.value.notes
