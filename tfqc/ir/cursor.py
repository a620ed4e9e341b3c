"""A place in one line of IR text, and the small things that are read there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tfqc.errors import IRError
from tfqc.ir.types import DTYPES, Type, _parse_type

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}")
OPERATION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,255}")
TENSOR = re.compile(r"[A-Za-z0-9_.\-/]{1,512}")
TABLE = re.compile(r"[A-Za-z0-9_\-]{1,64}")
_KEYWORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})=")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?")
_JSON = json.JSONDecoder()
_DEEPEST, _LONGEST_TEXT = 16, 4096
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# What a literal that is neither number nor text may be: the values that stand in captured programs.
_FORMATS = {
    "strided": torch.strided, "contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d,
}  # fmt: skip
_DEVICES = {d: torch.device(d) for d in ("cpu", "meta", "cuda", *(f"cuda:{i}" for i in range(16)))}


def printable(value: Any, what: str) -> str:
    """A text of one line that people may be shown, and that may stand in emitted code.

    Raises:
        IRError: it is no text, is longer than anybody reads, or has control characters.
    """
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or _UNPRINTABLE.search(value):
        raise IRError(f"{what} is no text of one line of at most {_LONGEST_TEXT} characters.")
    return value


class Cursor:
    """Reads one line. `node` and `tensor` give the nodes that are called so in the text."""

    def __init__(self, text: str, node: Callable[[str], fx.Node], tensor: Callable[[str], fx.Node]) -> None:
        self.text, self.at = text, 0
        self._node, self._tensor = node, tensor

    def fail(self, wanted: str) -> IRError:
        """The error for what is not here."""
        return IRError(f"expected {wanted} at column {self.at + 1}.", " " * min(self.at, 400) + "^")

    def take(self, literal: str) -> bool:
        """Go past a literal, if it is here."""
        found = self.text.startswith(literal, self.at)
        self.at += len(literal) if found else 0
        return found

    def expect(self, literal: str) -> None:
        """Go past a literal."""
        if not self.take(literal):
            raise self.fail(repr(literal))

    def comma(self) -> None:
        """Go past a comma and a blank, if they are here."""
        if self.take(","):
            self.take(" ")

    def end(self) -> None:
        """The line ends here."""
        if self.at < len(self.text):
            raise self.fail("the end of the line")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        """Go past what a pattern matches."""
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.fail(what)
        self.at = found.end()
        return found[0]

    def tensor_name(self) -> str:
        """`@name`, or `@"a name"` of other characters."""
        self.expect("@")
        if self.text.startswith('"', self.at):
            return printable(self.json(), "the tensor's name")
        # A type follows ': ', so a colon inside a name is never followed by a blank.
        return self.match(TENSOR, "a tensor's name")

    def keyword(self) -> str | None:
        """`name=`, if it is here."""
        found = _KEYWORD.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[1]

    def type(self) -> Type:
        """A type."""
        type_, self.at = _parse_type(self.text, self.at)
        return type_

    def json(self) -> Any:
        """A JSON value."""
        value, self.at = _JSON.raw_decode(self.text, self.at)
        return value

    def items(self, close: str, depth: int = 0) -> list[Any]:
        """Values with commas between them, up to a bracket."""
        items: list[Any] = []
        while not self.take(close):
            items.append(self.value(depth + 1))
            self.comma()
        return items

    def value(self, depth: int = 0) -> Any:
        """An operand: a node, a tensor, or a literal."""
        if depth > _DEEPEST:
            raise self.fail(f"no more than {_DEEPEST} brackets")
        if self.take("%"):
            return self._node(self.match(NAME, "a node's name"))
        if self.text.startswith("@", self.at):
            return self._tensor(self.tensor_name())
        if self.take("["):
            return self.items("]", depth)
        if self.take("("):
            return tuple(self.items(")", depth))
        if self.take("{"):
            return self._mapping(depth)
        if self.text.startswith('"', self.at):
            return self._text()
        for literal, constant in (("None", None), ("True", True), ("False", False)):
            if self.take(literal):
                return constant
        return self._call_like(depth)

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.take("}"):
            if not self.text.startswith('"', self.at) or (key := self._text()) in found:
                raise self.fail("each key once, in quotes,")
            self.expect(": ")
            found[key] = self.value(depth + 1)
            self.comma()
        return found

    def _text(self) -> str:
        value = self.json()
        if len(value) > _LONGEST_TEXT:
            raise IRError(f"a text is {len(value)} characters long: {_LONGEST_TEXT} are as many as operands have.")
        return value

    def _call_like(self, depth: int) -> Any:
        if self.take("dtype("):
            name = self.match(NAME, "a dtype")
            self.expect(")")
            return DTYPES[name]
        if self.take("device("):
            name = self.match(re.compile(r"[a-z]+(:[0-9]+)?"), "a device")
            self.expect(")")
            return _DEVICES[name]
        if self.take("float("):
            name = self.match(re.compile(r"-?(inf|nan)"), "inf or nan")
            self.expect(")")
            return float(name)
        if self.take("slice("):
            return slice(*self.items(")", depth))
        if self.take("torch."):
            return _FORMATS[self.match(NAME, "a layout or memory format")]
        return self._number()

    def _number(self) -> int | float:
        number = self.match(_NUMBER, "a value")
        if not re.fullmatch(r"-?[0-9]+", number):
            value = float(number)
            if value in (float("inf"), float("-inf")):
                raise self.fail("a number that 64 bits hold before this column, instead of one so large,")
            return value
        if len(number) > 20 or not -(2**63) <= int(number) < 2**63:
            raise self.fail("a whole number of 64 bits before this column, instead of one so large,")
        return int(number)
