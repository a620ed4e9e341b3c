"""YAML from outside as plain data: of YAML 1.2's core schema, without anchors, aliases and tags, and small.

`no`, `on`, `1:30` and dates are text, as in YAML 1.2; a number is what JSON calls one, a plus sign and leading zeros
allowed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from tfqc.errors import TfqcError

_LONGEST, _DEEPEST = 1 << 18, 16  # characters, and levels
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)

Place = tuple[str | int, ...]


@dataclass
class YamlText:
    """A value, and the line on which each of its parts begins (1 is the first): of a key, that of the key."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict[Place, int])


def parse_yaml(text: str, what: str, raises: type[TfqcError]) -> YamlText:
    """Read one document.

    Raises:
        TfqcError: (of the type `raises`) it is none, or has what is not taken; the sentence begins with `what`.
    """
    if len(text) > _LONGEST:
        raise raises(f"{what} has {len(text)} characters: {_LONGEST} are as many as are read.")
    found = YamlText()
    try:
        _check_events(text, what, raises)  # before anything is built: an alias of aliases grows without end
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        because = getattr(error, "problem", None) or next(iter(str(error).splitlines()), "")
        raise raises(f"{what}{line} is no YAML: {str(because)[:200].rstrip('.')}.") from error
    if node is not None:
        found.value = _value(node, (), found.lines, what, raises)
    return found


def _check_events(text: str, what: str, raises: type[TfqcError]) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        has = ""
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            has = "an anchor or an alias: write the value out"
        elif getattr(event, "tag", None) is not None:
            has = "a tag: leave it out"
        elif depth > _DEEPEST:
            has = f"more than {_DEEPEST} levels"
        if has:
            raise raises(f"{what}, line {event.start_mark.line + 1} has {has}.")


def _value(node: yaml.Node, at: Place, lines: dict[Place, int], what: str, raises: type[TfqcError]) -> Any:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*at, number), lines, what, raises) for number, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, what, raises)
    found: dict[str, Any] = {}
    for key_node, item in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node, what, raises) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise raises(f"{what}, line {line} has a key that is no text.")
        if key in found:
            raise raises(f"{what}, line {line} has the key {key[:60]!a} a second time.")
        lines[(*at, key)] = line
        found[key] = _value(item, (*at, key), lines, what, raises)
    return found


def _scalar(node: Any, what: str, raises: type[TfqcError]) -> Any:
    text = str(node.value)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise raises(f"{what}, line {node.start_mark.line + 1} has half a character.")
    if node.style is not None:  # quoted, or a block
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else text
