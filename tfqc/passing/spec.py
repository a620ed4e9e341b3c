"""The grammar in which passes, pipelines and targets are written: `name{option=value other=a,b}`.

Names and options are kebab-case outside and snake_case in Python. Options are the fields of a frozen
dataclass and are read by their type hints; `to_text` prints those that differ from their defaults, so that
text round-trips. A value with blanks or punctuation stands in quotes, as in JSON; `option=` is the empty
tuple. Line breaks and `#` comments are blanks, and a comma may stand after the last name. YAML says the same
as a list of names and of `name: {option: value}`, without anchors and aliases.

One value has no text: the string "none" as an option of type `str | None`, where `none` is Python's None.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from tfqc.errors import SpecError, suggest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]{0,127}")
_BARE = re.compile(r'[^\s{}",#\x00-\x1f\ud800-\udfff]+')
_YAML = re.compile(r"(?:\s|#[^\n]*+|---)*+-\s")
_WHOLE = re.compile(r"[+-]?[0-9]{1,300}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_JSON = json.JSONDecoder(strict=False)
_LONGEST, _DEEPEST, _MOST = 1 << 20, 8, 10_000  # characters, brackets in brackets, values
_STRANGE = re.compile(r"[\x00-\x08\x0e-\x1f\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Spec:
    """A name and its options as text; an option may have several values, or none."""

    name: str
    options: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


# -- text and YAML to specs ----------------------------------------------------------------------------------


def parse_specs(text: str) -> list[Spec]:
    """Read `a,b{x=1 y=p,q},c`, or the same as YAML (text that begins with a dash is YAML).

    Raises:
        SpecError: malformed text, with the place underlined in a note.
    """
    if len(text) > _LONGEST:
        raise SpecError(f"The text has {len(text)} characters: {_LONGEST} are as many as specs have.")
    if strange := _STRANGE.search(text):
        raise Reader(text, strange.start()).fail(f"text, not the character {strange[0]!r},")
    return _specs_from_yaml(text) if _YAML.match(text) else Reader(text).specs()


class Reader:
    """A place in the text, and what is read there."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text, self.at = text, at

    def specs(self) -> list[Spec]:
        found: list[Spec] = []
        self.blank()
        while self.at < len(self.text):
            found.append(Spec(self.match(_WORD, "a name"), self.options()))
            if self.at < len(self.text) and not self.take(","):
                raise self.fail("',' between names")
            self.blank()
        return found

    def options(self) -> dict[str, tuple[str, ...]]:
        """`{x=1 y=p,q}` or nothing, and the blanks around it."""
        found: dict[str, tuple[str, ...]] = {}
        self.blank()
        if not self.take("{"):
            return found
        self.blank()
        while not self.take("}"):
            start = self.at
            name = kebab(self.match(_WORD, "an option's name or '}'"))
            if name in found:
                self.at = start
                raise self.fail(f"each option once, not {name!r} again,")
            if not self.take("="):
                raise self.fail(f"'=' after option {name!r}")
            found[name] = self.values()
            self.blank()
        self.blank()
        return found

    def values(self) -> tuple[str, ...]:
        if self.at == len(self.text) or self.text[self.at] in "}#" or self.text[self.at].isspace():
            return ()
        found = [self.value()]
        while self.take(","):
            found.append(self.value())
        return tuple(found)

    def value(self) -> str:
        if not self.text.startswith('"', self.at):
            return self.match(_BARE, "a value")
        try:
            value, end = _JSON.raw_decode(self.text, self.at)
        except ValueError as error:
            raise self.fail("a value and its closing quote") from error
        if half := _SURROGATE.search(value):
            raise self.fail(f"whole characters, not {half[0]!r},")
        self.at = end
        return value

    def blank(self) -> None:
        self.match(_BLANK, "blanks or nothing")

    def take(self, literal: str) -> bool:
        found = self.text.startswith(literal, self.at)
        self.at += len(literal) if found else 0
        return found

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.fail(what)
        self.at = found.end()
        return found[0]

    def fail(self, what: str) -> SpecError:
        lines, row = self.text.split("\n"), self.text.count("\n", 0, self.at)
        column = self.at - (self.text.rfind("\n", 0, self.at) + 1)
        where = f"column {column + 1}" if len(lines) == 1 else f"line {row + 1}, column {column + 1}"
        begin = max(column - 60, 0)
        shown = lines[row][begin : begin + 120] if len(lines[row]) > 120 else lines[row]
        begin, shown = (begin if len(lines[row]) > 120 else 0), _STRANGE.sub("?", shown)
        return SpecError(f"Expected {what} at {where} of {shown!r}.", shown, " " * (column - begin) + "^")


def _specs_from_yaml(text: str) -> list[Spec]:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            anchored = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None
            if anchored or getattr(event, "tag", None) is not None or depth > _DEEPEST:
                what = "an anchor, an alias or a tag" if depth <= _DEEPEST else f"more than {_DEEPEST} levels"
                mark = event.start_mark
                raise SpecError(f"This YAML has {what} at line {mark.line + 1}, column {mark.column + 1}: no spec has.")
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError) as error:  # a date of month 99
        raise SpecError(f"This is no valid YAML: {str(error)[:400]}") from error
    if not isinstance(loaded, list):
        raise SpecError("In YAML a spec is a list: `- name` on each line.")
    return [_spec_from_data(item) for item in loaded]


def _spec_from_data(item: Any) -> Spec:
    match item:
        case str():
            return Spec(_name(item))
        case dict() if len(item) == 1:
            ((name, options),) = item.items()
            if isinstance(options, dict):
                found: dict[str, tuple[str, ...]] = {}
                for key, value in options.items():
                    if kebab(option := _name(key)) in found:
                        raise SpecError(f"In YAML {name!r} has the option {option!r} twice.")
                    found[kebab(option)] = _texts_of_data(value, option)
                return Spec(_name(name), found)
        case _:
            pass
    raise SpecError(f"In YAML an item is a name or `name: {{option: value}}`, not {_shown(item)}.")


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise SpecError(f"In YAML {_shown(value)} is no name of a pass, a target or an option.")
    return value


def _texts_of_data(value: Any, option: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    if len(items) > _MOST:
        raise SpecError(f"In YAML the option {option!r} has {len(items)} values: {_MOST} are as many as options have.")
    for item in items:
        if not (item is None or isinstance(item, (str, int, float))):
            raise SpecError(f"In YAML the option {option!r} has {_shown(item)}: numbers and text can stand there.")
    try:
        texts = _texts(value)
    except ValueError as error:  # a number of more digits than Python prints
        raise SpecError(f"In YAML the option {option!r} has a number that is too long.") from error
    if any(_SURROGATE.search(text) for text in texts):
        raise SpecError(f"In YAML the option {option!r} has a text of half characters.")
    return texts


def _shown(value: Any) -> str:
    """A value in a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."


# -- specs to objects and back -------------------------------------------------------------------------------


def build(cls: type[T], spec: Spec, what: str) -> T:
    """Make a dataclass from a spec; `what` names its kind in messages ("pass", "target").

    Raises:
        SpecError: an unknown option (with a suggestion), a missing one, or a value of the wrong type or
            range.
    """
    fields = {kebab(f.name): f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    label = f"{what.capitalize()} {spec.name!r}"
    values: dict[str, Any] = {}
    for name, given in spec.options.items():
        known = fields.get(kebab(name))
        if known is None:
            raise SpecError(f"{label} has no option {name!r}.{suggest(name, list(fields))}")
        try:
            values[known.name] = _convert(hints[known.name], given)
        except ValueError as error:
            raise SpecError(f"{label}, option {name!r}: {error}.") from error
    for name, known in fields.items():
        if known.name not in values and _default(known) is dataclasses.MISSING:
            raise SpecError(f"{label} needs the option {name!r}: {spec.name}{{{name}=...}}.")
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass may check ranges in __post_init__
        raise SpecError(f"{label}: {str(error).rstrip('.')}.") from error


def to_text(name: str, value: DataclassInstance) -> str:
    """`name{options that differ from their defaults}`."""
    options = [f"{key}={_join(current)}" for key, current in changed_options(value).items()]
    return f"{name}{{{' '.join(options)}}}" if options else name


def to_yaml(items: typing.Iterable[tuple[str, DataclassInstance]]) -> str:
    """Names and their dataclasses as YAML, one a line."""
    data: list[Any] = []
    for name, value in items:
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in changed_options(value).items()}
        data.append({name: options} if options else name)
    return yaml.safe_dump(data, sort_keys=False)


def changed_options(value: DataclassInstance) -> dict[str, Any]:
    """The options of a dataclass that differ from their defaults, by kebab-case name."""
    found = {f: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return {kebab(f.name): current for f, current in found.items() if current != _default(f)}


def options_of(cls: type[DataclassInstance]) -> dict[str, tuple[str, str]]:
    """Option name -> (type as text, default as text), for help and listings."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[str, str]] = {}
    for known in dataclasses.fields(cls):
        default = _default(known)
        text = "required" if default is dataclasses.MISSING else _join(default)
        found[kebab(known.name)] = (_describe(hints[known.name]), text)
    return found


def kebab(name: str) -> str:
    """`fold_cache` -> `fold-cache`."""
    return name.replace("_", "-")


def _default(known: dataclasses.Field[Any]) -> Any:
    """A field's default; `MISSING` when it has none."""
    return known.default if known.default_factory is dataclasses.MISSING else known.default_factory()


# -- values and their text -----------------------------------------------------------------------------------


def _texts(value: Any) -> tuple[str, ...]:
    """An option's value as the words that stand for it."""
    if isinstance(value, (list, tuple)):
        return tuple(_show(item) for item in value)
    return (_show(value),)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _join(value: Any) -> str:
    """An option's value as text."""
    texts = _texts(value)
    return ",".join(t if _BARE.fullmatch(t) else json.dumps(t, ensure_ascii=False) for t in texts)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(_show, arguments))
    if origin is tuple:
        return ",".join("..." if a is Ellipsis else _describe(a) for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return "|".join(map(_describe, arguments))
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _convert(hint: Any, given: tuple[str, ...]) -> Any:
    """The value that words stand for, under a type hint. ValueError says why they stand for none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, given)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(given)
        if len(arguments) != len(given):
            raise ValueError(f"{len(arguments)} values are wanted, not {len(given)}")
        return tuple(_convert(a, (item,)) for a, item in zip(arguments, given, strict=True))
    if len(given) != 1:
        raise ValueError(f"one value is wanted, not {','.join(given)!r}")
    text = given[0]
    if origin is Literal:
        for choice in arguments:
            if _show(choice) == text:
                return choice
        raise ValueError(f"{_shown(text)} is not one of {', '.join(map(_show, arguments))}")
    if hint is str:
        return text
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{_shown(text)} is neither true nor false")
        return text == "true"
    if hint is int:
        if not _WHOLE.fullmatch(text):
            raise ValueError(f"{_shown(text)} is no whole number")
        return int(text)
    if hint is float:
        if text in ("inf", "-inf"):
            return float(text)
        if not _NUMBER.fullmatch(text) or math.isinf(value := float(text)):
            raise ValueError(f"{_shown(text)} is no number")
        return value
    raise TypeError(f"Options of type {hint!r} are not supported.")


def _convert_union(arguments: tuple[Any, ...], given: tuple[str, ...]) -> Any:
    if given == ("none",) and type(None) in arguments:
        return None
    failures: list[str] = []
    for argument in arguments:
        if argument is not type(None):
            try:
                return _convert(argument, given)
            except ValueError as error:
                failures.append(str(error))
    raise ValueError(failures[0])
