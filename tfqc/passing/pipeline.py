"""Pipelines: a tuple of passes, written as text, checked before anything runs, run as written."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import PassError, PipelineError, TfqcError
from tfqc.ir.program import Program, Stage
from tfqc.ir.tables import Fact, row_class
from tfqc.passing.base import Pass
from tfqc.passing.context import Context
from tfqc.passing.instrument import Instrument, VerifyEach
from tfqc.passing.known import find_pass
from tfqc.passing.order import check_calibration, check_order, kept_tables, provided_tables, tables_of
from tfqc.passing.spec import build, parse_specs, to_yaml
from tfqc.progress import Silent


@dataclass(frozen=True)
class Pipeline:
    """An ordered sequence of passes: `normalize,discover-tib,fold-cache{mode=bias}`."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        for item in self.passes:
            if isinstance(item, type) and issubclass(item, Pass):
                raise PipelineError(f"{item.__name__} is the class of a pass: put {item.__name__}() into the pipeline.")
            if not isinstance(item, Pass):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise PipelineError(f"A {type(item).__name__} is no pass: derive from tfqc.Pass, or parse text.")

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """From text, or from YAML (a list of names and of one-key mappings from name to options).

        Raises:
            SpecError: malformed text, an unknown pass or option (with a suggestion), a value out of range.
        """
        return cls(tuple(build(find_pass(spec.name), spec, "pass") for spec in parse_specs(text)))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.passes + other.passes)

    def to_yaml(self) -> str:
        """The same pipeline as YAML, one pass a line."""
        return to_yaml((item.name, item) for item in self.passes)

    def check(
        self,
        stage: Stage = Stage.CAPTURED,
        tables: Iterable[Fact] = (),
        ctx: Context | None = None,
        weights: bool = True,
        program: Program | None = None,
    ) -> Stage:
        """Refuse what cannot work, before anything runs: an order, or options that ask for what is not there.

        Args:
            stage, tables: of the program that it is to run on (`tables_of` tells the columns of tables, too).
            ctx: with the data that passes may need; without it nothing is known about them.
            weights: whether the program has them.
            program: the one that it is to run on, where that is known: some need less than others.

        Returns:
            The stage that a program of `stage` has in the end.

        Raises:
            PipelineError: one sentence that says what is missing and which pass provides it.
        """
        return check_order(self.passes, stage, tables, ctx, weights, program)

    def run(
        self,
        program: Program,
        ctx: Context | None = None,
        instruments: Sequence[Instrument] | None = None,
    ) -> Program:
        """Run the passes in order on the program, in place. A pass that fails leaves it as it was before it.

        `instruments` nest around each pass, the first outermost: the last one sees a pass begin last and end
        first. By default the verifier runs between passes.

        Raises:
            PipelineError: the order cannot work (nothing has run).
            PassError: a pass failed, or broke what it declares.
        """
        ctx = ctx or Context()
        instruments = [VerifyEach()] if instruments is None else instruments
        self.check(program.stage, tables_of(program), ctx, program.has_weights or ctx.rehearsal, program)
        check_calibration(self.passes, program, ctx)
        for instrument in instruments:
            instrument.start(program, self)
        try:
            for number, item in enumerate(self.passes, 1):
                before = program.clone()
                try:
                    _run_one(item, number, program, before, ctx, instruments)
                except BaseException as error:
                    vars(program).update(vars(before.clone()))
                    if isinstance(error, Exception):
                        self._fail(item, number, before, ctx, instruments, error)
                    raise
        finally:
            for instrument in reversed(instruments):
                instrument.said(ctx.remarks)
                instrument.finish(program)
        return program

    def rehearse(self, program: Program, ctx: Context, instruments: Sequence[Instrument] = ()) -> Program:
        """What the passes make of a copy of the program without weights, measuring and training nothing.

        It takes seconds where a run takes minutes. Operations and types are those of a run (but for what
        `select-maintenance{strategy=auto}` chooses), so what a pass or a backend refuses comes out.

        Raises:
            TfqcError: as `run` would.
        """
        copy = program.clone()
        copy.tensors = {name: tensor.to("meta") for name, tensor in copy.tensors.items()}
        return self.run(copy, replace(ctx, rehearsal=True, remarks=[], progress=Silent()), instruments)

    def _fail(
        self,
        item: Pass,
        number: int,
        before: Program,
        ctx: Context,
        instruments: Sequence[Instrument],
        error: Exception,
    ) -> None:
        """Give the error the notes of all instruments; errors that are not for users become a PassError."""
        notes: list[str] = []
        for instrument in reversed(instruments):
            try:
                notes += instrument.failed(before, item, number, self, ctx, error)
            except Exception as trouble:  # must not hide the error that it was to explain
                notes.append(f"{type(instrument).__name__} failed in turn: {trouble}")
        if isinstance(error, TfqcError):
            for note in (f"in pass #{number} {item}", *notes):
                error.add_note(note)
            return
        first = next(iter(str(error).splitlines()), "")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PassError(
            f"Pass #{number} {item.name} failed: {type(error).__name__}: {first}",
            f"in pass #{number} {item}, at {frame.filename}:{frame.lineno} in {frame.name}",
            *notes,
        ) from error


def _run_one(
    item: Pass,
    number: int,
    program: Program,
    before: Program,
    ctx: Context,
    instruments: Sequence[Instrument],
) -> None:
    versions = {name: _version(tensor) for name, tensor in before.tensors.items()}
    for instrument in instruments:
        instrument.before(program, item, number)
    # Passes that train need gradients, whatever the caller compiles under.
    with ctx.running(item.name, number), torch.inference_mode(False):
        returned: Any = item.run(program, ctx)
    if returned is not None:
        raise PassError(f"{item.name} returned a {type(returned).__name__}: passes change the program that they get.")
    for name, tensor in before.tensors.items():
        if _version(tensor) != versions[name]:
            raise PassError(f"{item.name} changed tensor @{name} in place: passes replace tensors, others hold them.")
    _settle(program, before, item)
    for instrument in reversed(instruments):
        instrument.after(program, before, item, number)


def _settle(program: Program, before: Program, item: Pass) -> None:
    """Hold a pass to what it declares: drop derived tables that it does not preserve, move the stage."""
    contract = item.contract()
    kept = {kind.table: kind for kind in kept_tables(contract, map(row_class, before.tables))}
    provides = {kind.table for kind in provided_tables(contract)}
    tables = set(program.tables)
    if absent := sorted(provides - tables):
        raise PassError(f"{item.name} declares that it provides the table {absent[0]!r}, and did not.")
    if absent := sorted(kept.keys() - tables):
        if kept[absent[0]].durable:
            raise PassError(f"{item.name} removed the table {absent[0]!r}, which is durable.")
        raise PassError(f"{item.name} declares that it preserves the table {absent[0]!r}, and removed it.")
    if extra := sorted(tables - set(before.tables) - provides):
        raise PassError(f"{item.name} made the table {extra[0]!r} without declaring it in `provides`.")
    for table in tables - kept.keys() - provides:
        del program.tables[table]
    program.stage = max(before.stage, contract.reaches)
    program.prune()


def _version(tensor: Tensor) -> int:
    """A number that grows whenever a tensor is written to; tensors of inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version
