"""What is refused before a pipeline runs: an order that cannot work, and data that are missing or do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from tfqc.errors import CalibrationError, PipelineError, suggest
from tfqc.ir.program import Program, Role, Stage
from tfqc.ir.tables import Column, Fact, Row, fact_name, row_class
from tfqc.ir.types import Dim
from tfqc.passing.base import ALL_TABLES, Contract, Pass
from tfqc.passing.context import Context
from tfqc.passing.known import sound_passes
from tfqc.sampling.calls import ModelCalls


def check_order(
    passes: Sequence[Pass],
    stage: Stage,
    tables: Iterable[Fact],
    ctx: Context | None,
    weights: bool,
    program: Program | None = None,
) -> Stage:
    """See `Pipeline.check`."""
    have = set(tables)
    raised: dict[Stage, str] = {}  # stage -> the pass that reached it
    gave: dict[Fact, str] = {}  # table -> the pass that provided it
    dropped: dict[Fact, str] = {}  # table -> the pass that dropped it
    for number, item in enumerate(passes, 1):
        label, its = f"#{number} {item.name}", item.contract()
        if stage < its.needs:
            raise PipelineError(
                f"{label} needs stage {its.needs} but the program is only {stage} there: "
                f"put {_reaching(its.needs)} before it."
            )
        if its.below is not None and stage >= its.below:
            advice = f"put it before {raised[stage]}" if stage in raised else "start from an earlier program"
            raise PipelineError(f"{label} works below stage {its.below} but the program is {stage} there: {advice}.")
        if absent := sorted(its.requires - have, key=fact_name):
            raise PipelineError(f"{label} {_lack(absent[0], have, gave, dropped)}.")
        if lacking := _lacking(its.data if program is None else item.draws_on(program), ctx, weights):
            raise PipelineError(f"{label} {lacking}.")
        lasting, anew = kept_tables(its, map(_table, have)), provided_tables(its)
        kept = {f for f in have if _table(f) in lasting and (f in anew or _table(f) not in anew)} | its.provides
        dropped |= dict.fromkeys(have - kept, label)
        gave |= dict.fromkeys(anew, label)
        have = kept
        if its.reaches > stage:
            stage = its.reaches
            raised[stage] = label
    return stage


def kept_tables(contract: Contract, tables: Iterable[type[Row]]) -> set[type[Row]]:
    """Those of the tables that a pass leaves valid: what it preserves, and durable ones."""
    return {t for t in tables if t.durable or t in contract.preserves or contract.preserves == ALL_TABLES}


def provided_tables(contract: Contract) -> set[type[Row]]:
    """The tables, without columns, that a pass makes anew."""
    return {fact for fact in contract.provides if not isinstance(fact, Column)}


def tables_of(program: Program) -> set[Fact]:
    """A program's tables, and the columns that all of their rows have."""
    found: set[Fact] = set()
    for name, rows in program.tables.items():
        kind, columns = row_class(name), [set(row.columns()) for row in rows.values()]
        found |= {kind, *(kind.column(c) for c in (set.intersection(*columns) if columns else ()))}
    return found


def check_calibration(passes: Sequence[Pass], program: Program, ctx: Context) -> None:
    """Refuse calibration data that are not what the model takes, if a pass is to sample with them.

    Raises:
        CalibrationError: an input that is missing, or of another shape.
    """
    data = ctx.calibration
    if data is None or not any("calibration" in item.draws_on(program) for item in passes):
        return
    if isinstance(data, ModelCalls):
        return _check_calls(data, program)
    given = {**data.cond, **data.shared}
    taken = [".".join(item.path) for item in program.inputs if item.role is not Role.TIME]
    for name in given:
        if program.arguments and name.partition(".")[0] not in program.arguments:
            raise CalibrationError(f"Calibration: {name!r} is no input of the model.{suggest(name, taken)}")
    for item in [*program.input(Role.REQUEST), *program.input(Role.SAMPLE)[1:]]:
        if ".".join(item.path) in data.following:
            continue
        if (path := ".".join(item.path)) not in given:
            raise CalibrationError(f"The calibration data have no {path!r}, which the model needs.")
        rows = item.type.shape[:1] == ("B",)
        _check_shape(path, given[path], item.type.shape, rows)
        if data.uncond is not None and path in data.uncond:
            _check_shape(f"uncond {path}", data.uncond[path], item.type.shape, rows)
    if noisy := program.input(Role.SAMPLE):
        _check_shape("latents", data.latents, noisy[0].type.shape, True)


def _check_calls(data: ModelCalls, program: Program) -> None:
    for number, call in enumerate(data.calls):
        for item in program.inputs:
            if (path := ".".join(item.path)) not in call:
                raise CalibrationError(f"calibration[{number}] has no {path!r}, which the model needs.")
            if item.role is not Role.TIME:
                _check_shape(path, call[path], item.type.shape, item.type.shape[:1] == ("B",))


def _check_shape(name: str, given: Tensor, shape: tuple[Dim, ...], rows: bool) -> None:
    fits = given.dim() == len(shape) and all(
        isinstance(dim, str) or dim == size or (rows and at == 0)
        for at, (size, dim) in enumerate(zip(given.shape, shape, strict=True))
    )
    if not fits:
        wanted, got = "x".join(map(str, shape)), "x".join(map(str, given.shape)) or "a scalar"
        raise CalibrationError(f"Calibration: {name} is {got}, and the model takes {wanted}.")


def _lack(wanted: Fact, have: set[Fact], gave: dict[Fact, str], dropped: dict[Fact, str]) -> str:
    table = _table(wanted)
    if isinstance(wanted, Column) and table in have:
        there = ", ".join(sorted(f.name for f in have if isinstance(f, Column) and f.row is table))
        advice = f"let {gave[table]} provide it" if table in gave else _providing(table, "before it")
        return f"needs {wanted.name!r} in the table {table.table!r}, which has {there or 'nothing'} there: {advice}"
    lost = f"which {dropped[table]} drops" if table in dropped else "which is not there"
    advice = _providing(table, "between them" if table in dropped else "before it")
    return f"needs the table {table.table!r}, {lost}: {advice}"


def _lacking(data: frozenset[str], ctx: Context | None, weights: bool) -> str:
    """What a pass needs from outside and does not get; empty if nothing."""
    if "weights" in data and not weights:
        return "needs the weights, and the program has none (it is on the meta device): capture the model with them"
    return "" if ctx is None else ctx.lacks(data)


def _table(fact: Fact) -> type[Row]:
    """The table of a column; a table itself."""
    return fact.row if isinstance(fact, Column) else fact


def _reaching(stage: Stage) -> str:
    return _names_of(lambda cls: cls.reaches == stage) or f"a pass that reaches {stage}"


def _providing(table: type[Row], place: str) -> str:
    names = _names_of(lambda cls: table in cls.provides)
    return f"put {names} {place}" if names else "no known pass provides it"


def _names_of(wanted: Callable[[type[Pass]], bool]) -> str:
    return " or ".join(name for name, cls in sound_passes() if wanted(cls))
