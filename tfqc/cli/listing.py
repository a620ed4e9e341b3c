"""`tfqc passes`, `tfqc backends`, `tfqc models`: what there is, and who owns it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

if TYPE_CHECKING:
    from tfqc.passing.base import Pass
    from tfqc.registry import Entry

Name = Annotated[str | None, typer.Argument(help="Show this one in full.")]


@guarded
def passes(name: Name = None, as_json: options.AsJson = False) -> None:
    """List passes, or show one with its options."""
    from tfqc.passing.known import find_pass
    from tfqc.registry import entries
    from tfqc.report.tables import table

    if name is not None:
        found = _pass(name, find_pass(name), entries("passes")[name])
        return show(found, _details(found), as_json)
    rows = [_entry(entry, find_pass, _pass) for entry in entries("passes").values()]
    text = table(
        ("pass", "owner", "stage", "requires", "provides", "does"),
        [
            (r["name"], r["owner"], _stages(r), ", ".join(r["requires"]), ", ".join(r["provides"]), r["summary"])
            if "error" not in r
            else (r["name"], r["owner"], "", "", "", r["error"])
            for r in rows
        ],
    )
    return show(rows, text, as_json)


@guarded
def backends(name: Name = None, as_json: options.AsJson = False) -> None:
    """List backends, or show one with the options of its target."""
    from tfqc.codegen.known import find_backend
    from tfqc.registry import entries
    from tfqc.report.tables import table

    if name is not None:
        found = _backend(name, find_backend(name), entries("backends")[name])
        return show(found, _details(found), as_json)
    rows = [_entry(entry, find_backend, _backend) for entry in entries("backends").values()]
    text = table(
        ("backend", "owner", "target options", "does"),
        [(r["name"], r["owner"], ", ".join(r.get("options", [])), r.get("error") or r["summary"]) for r in rows],
    )
    return show(rows, text, as_json)


@guarded
def models(as_json: options.AsJson = False) -> None:
    """List the models that ship with tfqc."""
    from tfqc.models.zoo import MODELS
    from tfqc.report.tables import table

    rows = [{"name": name, "summary": _first_line(make)} for name, make in MODELS.items()]
    text = table(("model", "what it is"), [(r["name"], r["summary"]) for r in rows])
    text += "\n\nA diffusers folder, or package.module:factory, can stand wherever a model's name can."
    show(rows, text, as_json)


def _entry(entry: Entry, find: Any, describe: Any) -> dict[str, Any]:
    """What a listing says about an entry; of a plug-in that does not load, why."""
    from tfqc.errors import SpecError

    try:
        return describe(entry.name, find(entry.name), entry)
    except SpecError as error:
        return {"name": entry.name, "owner": _owner(entry), "error": str(error)}


def _pass(name: str, cls: type[Pass], entry: Entry) -> dict[str, Any]:
    from tfqc.ir.tables import fact_name

    return {
        "name": name,
        "owner": _owner(entry),
        "summary": _first_line(cls),
        "needs": str(cls.needs),
        "below": None if cls.below is None else str(cls.below),
        "reaches": str(cls.reaches) if cls.reaches > cls.needs else None,
        "requires": sorted(map(fact_name, cls.requires)),
        "provides": sorted(map(fact_name, cls.provides)),
        "numerics": cls.numerics.kind + (f" ({cls.numerics.tolerance:g})" if cls.numerics.tolerance else ""),
        "data": sorted(cls.data),
        "options": _options(cls),
        "documentation": _doc(cls),
    }


def _backend(name: str, cls: Any, entry: Entry) -> dict[str, Any]:
    return {
        "name": name,
        "owner": _owner(entry),
        "summary": _first_line(cls),
        "options": _options(cls.options),
        "documentation": f"{_doc(cls)}\n\n{_doc(cls.options)}".strip(),
        "notes": cls.notes(),
    }


def _options(cls: type[Any]) -> dict[str, dict[str, str]]:
    from tfqc.passing.spec import options_of

    return {name: {"type": kind, "default": default} for name, (kind, default) in options_of(cls).items()}


def _details(found: dict[str, Any]) -> str:
    from tfqc.report.tables import facts, table

    known = {key: ", ".join(v) if isinstance(v, list) else v for key, v in found.items()}
    shown = facts({k: v for k, v in known.items() if k not in ("summary", "options", "documentation", "notes")})
    rows = [(name, option["type"], option["default"]) for name, option in found["options"].items()]
    options_text = table(("option", "type", "default"), rows) if rows else "no options"
    return "\n\n".join(filter(None, (found["documentation"], shown, options_text, found.get("notes"))))


def _stages(row: dict[str, Any]) -> str:
    return f"{row['needs']} -> {row['reaches']}" if row["reaches"] else row["needs"]


def _owner(entry: Entry) -> str:
    return f"{entry.owner} {entry.version}".strip()


def _doc(thing: Any) -> str:
    """Its own docstring: none of its base's, and not the signature that dataclasses put in the place of one."""
    own = vars(thing).get("__doc__") or ""
    return "" if own.startswith(f"{thing.__name__}(") else inspect.cleandoc(own)


def _first_line(thing: Any) -> str:
    return _doc(thing).split("\n")[0]
