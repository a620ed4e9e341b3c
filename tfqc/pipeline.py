"""Pipelines: a tuple of passes, written as text, checked before anything runs, run as written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tfqc.errors import PassError, PipelineError, SpecError, TfqcError
from tfqc.instruments import Instrument, VerifyEach
from tfqc.ir.program import Program, Stage
from tfqc.passing import ALL_TABLES, Context, Pass
from tfqc.registry import find_pass, pass_names
from tfqc.spec import Spec, build, parse_specs


@dataclass(frozen=True)
class Pipeline:
    """An ordered sequence of passes: `normalize,discover-tib,fold-cache{mode=bias}`."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """From text, or from YAML (a list of names and of one-key mappings from name to options).

        Raises:
            SpecError: malformed text, an unknown pass or option (with a suggestion), a value out of range.
        """
        stripped = text.strip()
        specs = _from_yaml(stripped) if stripped.startswith("- ") else parse_specs(stripped)
        return cls(tuple(build(find_pass(spec.name), spec, "pass") for spec in specs))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.passes + other.passes)

    def to_yaml(self) -> str:
        """The same pipeline as YAML, one pass a line."""
        items: list[Any] = []
        for spec in parse_specs(str(self)):
            options = {k: v[0] if len(v) == 1 else list(v) for k, v in spec.options.items()}
            items.append({spec.name: options} if options else spec.name)
        return yaml.safe_dump(items, sort_keys=False)

    def check(self, stage: Stage = Stage.CAPTURED, tables: Sequence[str] = (), ctx: Context | None = None) -> Stage:
        """Refuse an order that cannot work, before anything runs.

        Returns:
            The stage that a program of `stage` has in the end.

        Raises:
            PipelineError: one sentence that says what is missing and which pass provides it.
        """
        have = set(tables)
        for number, item in enumerate(self.passes, 1):
            label = f"#{number} {item.name}"
            if stage < item.needs:
                helper = _who(lambda p, want=item.needs: p.reaches >= want, "reaches")
                raise PipelineError(
                    f"{label} needs stage {item.needs} but the program is only {stage} there: "
                    f"put {helper(item.needs)} before it."
                )
            if item.below is not None and stage >= item.below:
                raise PipelineError(f"{label} works before stage {item.below}, but the program is {stage} there.")
            if absent := sorted(item.requires - have):
                providers = [n for n in pass_names() if absent[0] in find_pass(n).provides]
                hint = f"put {' or '.join(providers)} before it" if providers else "no known pass provides it"
                raise PipelineError(f"{label} needs the table {absent[0]!r}, which is not there: {hint}.")
            if ctx is not None and (lacking := sorted(d for d in item.data if not ctx.has(d))):
                raise PipelineError(f"{label} needs a {lacking[0]}: give one (schedule=..., calibration=...).")
            have = (have if item.preserves == ALL_TABLES else have & item.preserves) | item.provides
            stage = max(stage, item.reaches)
        return stage

    def run(
        self, program: Program, ctx: Context | None = None, instruments: Sequence[Instrument] | None = None
    ) -> Program:
        """Run the passes in order on the program, in place.

        `instruments` see the program before and after each pass; by default the verifier runs between passes.

        Raises:
            PipelineError: the order cannot work (nothing has run).
            PassError: a pass failed, or broke what it declares.
        """
        ctx = ctx or Context()
        instruments = [VerifyEach()] if instruments is None else list(instruments)
        self.check(program.stage, [n for n in program.tables], ctx)
        for instrument in instruments:
            instrument.start(program, self)
        for number, item in enumerate(self.passes, 1):
            before = program.clone()
            try:
                for instrument in instruments:
                    instrument.before(program, item, number)
                item.run(program, ctx)
                _settle(program, before, item)
                for instrument in instruments:
                    instrument.after(program, before, item, number)
            except KeyboardInterrupt:
                raise
            except Exception as error:
                _restore(program, before)
                notes = [n for i in instruments for n in i.failed(before, item, number, self, ctx, error)]
                if isinstance(error, TfqcError):
                    raise _with_notes(error, f"in pass #{number} {item}", *notes)  # noqa: B904
                raise PassError(
                    f"Pass #{number} {item.name} failed: {type(error).__name__}: {error}", *notes
                ) from error
        for instrument in instruments:
            instrument.finish(program)
        return program


def _settle(program: Program, before: Program, item: Pass) -> None:
    """Hold a pass to what it declares: drop tables that it does not preserve, move the stage."""
    if item.preserves != ALL_TABLES:
        for table in set(program.tables) - item.preserves - item.provides:
            del program.tables[table]
    if absent := sorted(item.provides - set(program.tables)):
        raise PassError(f"{item.name} declares that it provides the table {absent[0]!r}, and did not.")
    if extra := sorted(set(program.tables) - set(before.tables) - item.provides):
        raise PassError(f"{item.name} made the table {extra[0]!r} without declaring it in `provides`.")
    program.stage = max(program.stage, item.reaches)
    program.prune()


def _restore(program: Program, before: Program) -> None:
    """A failed pass leaves the program as it was before it."""
    program.__dict__.update(before.clone().__dict__)


def _with_notes(error: TfqcError, *notes: str) -> TfqcError:
    for note in notes:
        error.add_note(note)
    return error


def _who(match: Any, kind: str) -> Any:
    del kind

    def name(stage: Stage) -> str:
        found = [n for n in pass_names() if match(find_pass(n)) and find_pass(n).reaches == stage]
        return " or ".join(found) or f"a pass that reaches {stage}"

    return name


def _from_yaml(text: str) -> list[Spec]:
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"The pipeline is no valid YAML: {error}") from error
    specs: list[Spec] = []
    for item in loaded:
        if isinstance(item, str):
            specs.append(Spec(item))
        elif isinstance(item, dict) and len(item) == 1:
            ((name, options),) = item.items()
            specs.append(Spec(str(name), {str(k): _values(v) for k, v in (options or {}).items()}))
        else:
            raise SpecError(f"A pipeline in YAML is a list of pass names and `name: {{option: value}}`, not {item!r}.")
    return specs


def _values(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(str(v).lower() if isinstance(v, bool) else "none" if v is None else str(v) for v in items)
