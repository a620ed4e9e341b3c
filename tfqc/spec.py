"""The grammar in which passes, pipelines and targets are written: `name{option=value other=a,b}`.

Names and options are kebab-case outside and snake_case in Python. Options are the fields of a frozen dataclass and
are read by their type hints; `to_text` prints those that differ from their defaults, so that text round-trips.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tfqc.errors import SpecError, suggest

T = TypeVar("T")
_WORD = re.compile(r"[A-Za-z_][\w\-]*")
_VALUE = re.compile(r"[^\s{}\",]+")


@dataclass(frozen=True)
class Spec:
    """A name and its options as text; an option may have several values."""

    name: str
    options: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict[str, tuple[str, ...]])


def parse_specs(text: str) -> list[Spec]:
    """Read `a,b{x=1 y=p,q},c`. Line breaks and `#` comments are blanks.

    Raises:
        SpecError: malformed text, with the place underlined in a note.
    """
    text = re.sub(r"#[^\n]*", "", text).strip()
    specs: list[Spec] = []
    at = 0

    def fail(what: str) -> SpecError:
        return SpecError(f"Expected {what} at column {at + 1} of {text!r}.", text, " " * at + "^")

    def skip(position: int) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        return position

    while at < len(text):
        word = _WORD.match(text, at)
        if word is None:
            raise fail("a name")
        at = skip(word.end())
        options: dict[str, tuple[str, ...]] = {}
        if text.startswith("{", at):
            at = skip(at + 1)
            while not text.startswith("}", at):
                key = _WORD.match(text, at)
                if key is None:
                    raise fail("an option's name or '}'")
                if key[0] in options:
                    raise fail(f"each option once, not {key[0]!r} again,")
                at = key.end()
                if not text.startswith("=", at):
                    raise fail(f"'=' after option {key[0]!r}")
                at += 1
                values: list[str] = []
                while True:
                    if text.startswith('"', at):
                        end = text.find('"', at + 1)
                        if end < 0:
                            raise fail("a closing quote")
                        values.append(text[at + 1 : end])
                        at = end + 1
                    elif value := _VALUE.match(text, at):
                        values.append(value[0])
                        at = value.end()
                    else:
                        raise fail("a value")
                    if not text.startswith(",", at):
                        break
                    at += 1
                options[key[0]] = tuple(values)
                at = skip(at)
            at = skip(at + 1)
        specs.append(Spec(word[0], options))
        if at < len(text):
            if text[at] != ",":
                raise fail("',' between names")
            at = skip(at + 1)
    return specs


def build(cls: type[T], spec: Spec, what: str) -> T:
    """Make a dataclass from a spec; `what` names its kind in messages ("pass", "target").

    Raises:
        SpecError: an unknown option (with a suggestion), a missing one, or a value of the wrong type or range.
    """
    fields = {kebab(f.name): f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, given in spec.options.items():
        key = kebab(name)
        if key not in fields:
            raise SpecError(f"{what} {spec.name!r} has no option {name!r}.{suggest(key, list(fields))}")
        field = fields[key]
        try:
            values[field.name] = _convert(hints[field.name], given)
        except ValueError as error:
            raise SpecError(f"Option {name!r} of {what} {spec.name!r}: {error}.") from error
    missing = [
        key
        for key, f in fields.items()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
    ]
    if missing:
        raise SpecError(f"{what} {spec.name!r} needs the option {missing[0]!r}: {spec.name}{{{missing[0]}=...}}.")
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass may check ranges in __post_init__
        raise SpecError(f"{what} {spec.name!r}: {error}") from error


def to_text(name: str, value: Any) -> str:
    """`name{options that differ from their defaults}`."""
    parts: list[str] = []
    for field in dataclasses.fields(value):
        current = getattr(value, field.name)
        if field.default is not dataclasses.MISSING and current == field.default:
            continue
        if field.default_factory is not dataclasses.MISSING and current == field.default_factory():
            continue
        items = current if isinstance(current, tuple) else (current,)
        parts.append(f"{kebab(field.name)}={','.join(_quote(_show(i)) for i in items)}")
    return f"{name}{{{' '.join(parts)}}}" if parts else name


def options_of(cls: type[Any]) -> dict[str, tuple[str, str]]:
    """Option name -> (type as text, default as text), for help and listings."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else _show(field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = _show(field.default_factory())
        found[kebab(field.name)] = (_describe(hints[field.name]), default)
    return found


def kebab(name: str) -> str:
    """`fold_cache` -> `fold-cache`."""
    return name.replace("_", "-")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_show(v) for v in value)
    return "none" if value is None else str(value)


def _quote(text: str) -> str:
    return text if _VALUE.fullmatch(text) else f'"{text}"'


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"{_describe(arguments[0])},..."
    if origin in (types.UnionType, typing.Union):
        return "|".join(_describe(a) for a in arguments)
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _convert(hint: Any, given: tuple[str, ...]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return tuple(_convert(arguments[0], (item,)) for item in given)
    if len(given) != 1:
        raise ValueError(f"one value is wanted, not {','.join(given)!r}")
    text = given[0]
    if origin in (types.UnionType, typing.Union):
        if text == "none" and type(None) in arguments:
            return None
        failures: list[str] = []
        for argument in arguments:
            if argument is not type(None):
                try:
                    return _convert(argument, given)
                except ValueError as error:
                    failures.append(str(error))
        raise ValueError(failures[0])
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise ValueError(f"{text!r} is not one of {', '.join(map(str, arguments))}")
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole number' if hint is int else 'number'}") from None
    if hint is str:
        return text
    raise TypeError(f"Options of type {hint!r} are not supported.")
