"""IR text back to a Program: the inverse of `tfqc.ir.render`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfqc.errors import IRError
from tfqc.ir.ops import op_by_name
from tfqc.ir.program import Input, Origin, Program, Role, Stage
from tfqc.ir.render import VERSION
from tfqc.ir.tables import row_class, row_from_json
from tfqc.ir.types import DTYPES, TensorType, _parse_type

_NAME = re.compile(r"[A-Za-z_]\w*")
_TENSOR_NAME = re.compile(r"[\w.\-/:]+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|-?\d+\.\d*")
_JSON = json.JSONDecoder()


def parse(text: str, tensors: Mapping[str, Tensor] | None = None) -> Program:
    """Read IR text.

    Args:
        text: what `render` wrote.
        tensors: values of the declared tensors; without them they are on the meta device.

    Raises:
        IRError: the text is malformed (the message names the line and underlines the place), or a tensor is
            missing or of another type than declared.
    """
    program = Program({}, {}, ())
    reader = _Reader(program, tensors)
    if not text.startswith("tfqc-ir "):
        raise IRError("IR line 1: the text does not begin with 'tfqc-ir' and the format's number: it is no IR.")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            reader.line(line)
        except IRError as error:
            raise IRError(f"IR line {number}: {error}", line, *error.notes) from error
        except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, OverflowError) as error:
            raise IRError(f"IR line {number} is malformed: {error}.", line) from error
    if reader.graph is not None:
        raise IRError(f"@{reader.function} has no closing brace: the text ends inside it.")
    return program


class _Reader:
    """Reads line by line; a function's lines go through a `_Cursor`."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor] | None) -> None:
        self.program, self.given = program, tensors
        self.graph: fx.Graph | None = None
        self.function = ""
        self.env: dict[str, fx.Node] = {}
        self.table: str | None = None

    def line(self, line: str) -> None:
        if self.graph is not None:
            return self.body(line.strip())
        if self.table is not None and line.startswith("  "):
            key, _, value = line.strip().partition(" ")
            row = row_from_json(row_class(self.table), json.loads(value))
            self.program.tables[self.table][key] = row
            return None
        self.table = None
        word, _, rest = line.partition(" ")
        program = self.program
        match word:
            case "":
                pass
            case "tfqc-ir":
                if int(rest) > VERSION:
                    raise IRError(f"format {rest} is newer than {VERSION}, which this tfqc reads: upgrade tfqc.")
            case "model":
                program.model = json.loads(rest)
            case "stage":
                program.stage = Stage[rest.upper()]
            case "symbols":
                program.symbols = {k: int(v) for k, v in (item.split("=") for item in rest.split())}
            case "input":
                name, role, rest = rest.removeprefix("%").split(" ", 2)
                path, end = _JSON.raw_decode(rest)
                type_, end = _parse_type(rest, end + 2)
                domain = re.fullmatch(r" domain=(\d+)", rest[end:])
                if not isinstance(type_, TensorType):
                    raise IRError(f"input %{name} is no tensor.")
                item = Input(name, Role(role), tuple(path), type_, int(domain[1]) if domain else None)
                program.inputs = (*program.inputs, item)
            case "arguments":
                program.arguments = tuple(json.loads(rest))
            case "constant":
                path, end = _JSON.raw_decode(rest)
                program.constants[tuple(path)] = json.loads(rest[end:])
            case "guard":
                program.guards = (*program.guards, json.loads(rest))
            case "tensor":
                self.tensor(rest)
            case "func":
                self.open(rest)
            case "table":
                self.table = rest.strip()
                program.tables.setdefault(self.table, {})
            case _:
                raise IRError(f"{word!r} begins no line of IR text.")

    def tensor(self, text: str) -> None:
        cursor = _Cursor(self, text)
        name = cursor.tensor_name()
        cursor.expect(": ")
        type_ = cursor.type()
        if not isinstance(type_, TensorType):
            raise IRError(f"@{name} is declared with type {type_}, which is no tensor's.")
        shape = [d for d in type_.shape if isinstance(d, int)]
        if self.given is None:
            self.program.tensors[name] = torch.empty(shape, dtype=type_.dtype, device="meta")
            return
        if name not in self.given:
            raise IRError(f"no value is stored for tensor @{name}.")
        value = self.given[name]
        if value.dtype != type_.dtype or list(value.shape) != shape:
            raise IRError(f"@{name} is declared {type_}, stored {TensorType(value.dtype, tuple(value.shape))}.")
        self.program.tensors[name] = value

    def open(self, text: str) -> None:
        cursor = _Cursor(self, text)
        cursor.expect("@")
        self.function = cursor.match(_NAME, "a function's name")
        self.graph, self.env = fx.Graph(), {}
        cursor.expect("(")
        while not cursor.take(")"):
            cursor.expect("%")
            name = cursor.match(_NAME, "a parameter's name")
            cursor.expect(": ")
            self.program.types[name] = cursor.type()
            node = self.graph.create_node("placeholder", name, name=name)
            self.env[name] = node
            cursor.take(", ")

    def body(self, line: str) -> None:
        assert self.graph is not None
        cursor = _Cursor(self, line)
        if line == "}":
            self.program.functions[self.function] = self.graph
            self.graph = None
        elif cursor.take("return "):
            self.graph.output(cursor.value())
        elif cursor.take("note %"):
            self.attributes(cursor, cursor.match(_NAME, "a parameter's name"))
        elif cursor.take("%"):
            name = cursor.match(_NAME, "a node's name")
            cursor.expect(": ")
            self.program.types[name] = cursor.type()
            cursor.expect(" = ")
            target = op_by_name(cursor.match(_TENSOR_NAME, "an operation"))
            cursor.expect("(")
            args: list[Any] = []
            kwargs: dict[str, Any] = {}
            while not cursor.take(")"):
                if keyword := cursor.keyword():
                    kwargs[keyword] = cursor.value()
                else:
                    args.append(cursor.value())
                cursor.take(", ")
            node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=name)
            if node.name != name:
                raise IRError(f"%{name} is defined twice, or is a word that Python reserves.")
            self.env[name] = node
            self.attributes(cursor, name)
        else:
            raise IRError("inside a function a line is '%name: type = op(...)', 'note %name', 'return ...' or '}'.")
        if line != "}" and cursor.at < len(line):
            raise cursor.fail("the end of the line")

    def attributes(self, cursor: _Cursor, name: str) -> None:
        if not cursor.take("   {"):
            return
        module = source = ""
        while not cursor.take("}"):
            key = cursor.match(re.compile(r"[\w\-]+"), "an attribute's name")
            cursor.expect("=")
            value = cursor.json()
            if key == "at":
                module = value
            elif key == "src":
                source = value
            else:
                self.program.tables.setdefault(key, {})[name] = row_from_json(row_class(key), value)
            cursor.take(" ")
        if module or source:
            self.program.origins[name] = Origin(module, source)

    def tensor_node(self, name: str) -> fx.Node:
        assert self.graph is not None
        if name not in self.program.tensors:
            raise IRError(f"tensor @{name} is not declared.")
        self.program.functions[self.function] = self.graph
        if not any(n.op != "placeholder" for n in self.graph.nodes):
            node = self.graph.create_node("get_attr", name, name=_fresh_tensor_name(name))
            self.program.types[node.name] = _declared(self.program, name)
            return node
        return self.program.tensor_node(name, self.function)


def _fresh_tensor_name(name: str) -> str:
    from tfqc.ir.program import tensor_node_name

    return tensor_node_name(name)


def _declared(program: Program, name: str) -> TensorType:
    tensor = program.tensors[name]
    return TensorType(tensor.dtype, tuple(tensor.shape))


class _Cursor:
    """A place in one line, and the small things that are read there."""

    def __init__(self, reader: _Reader, text: str) -> None:
        self.reader, self.text, self.at = reader, text, 0

    def fail(self, wanted: str) -> IRError:
        return IRError(f"expected {wanted} at column {self.at + 1}.", " " * self.at + "^")

    def take(self, literal: str) -> bool:
        found = self.text.startswith(literal, self.at)
        self.at += len(literal) if found else 0
        return found

    def expect(self, literal: str) -> None:
        if not self.take(literal):
            raise self.fail(repr(literal))

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.fail(what)
        self.at = found.end()
        return found[0]

    def tensor_name(self) -> str:
        self.expect("@")
        # A type follows ': ', so a colon inside a name is never followed by a blank.
        return self.match(re.compile(r"[\w.\-/]+"), "a tensor's name")

    def keyword(self) -> str | None:
        found = re.compile(r"([A-Za-z_]\w*)=").match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[1]

    def type(self) -> Any:
        type_, self.at = _parse_type(self.text, self.at)
        return type_

    def json(self) -> Any:
        value, self.at = _JSON.raw_decode(self.text, self.at)
        return value

    def items(self, close: str) -> list[Any]:
        items: list[Any] = []
        while not self.take(close):
            items.append(self.value())
            if not self.take(", "):
                self.take(",")
        return items

    def value(self) -> Any:
        reader = self.reader
        if self.take("%"):
            name = self.match(_NAME, "a node's name")
            if name not in reader.env:
                raise IRError(f"%{name} is read before it is defined.")
            return reader.env[name]
        if self.text.startswith("@", self.at):
            return reader.tensor_node(self.tensor_name())
        if self.take("["):
            return self.items("]")
        if self.take("("):
            return tuple(self.items(")"))
        if self.take("{"):
            result: dict[str, Any] = {}
            while not self.take("}"):
                key = self.json()
                self.expect(": ")
                result[key] = self.value()
                self.take(", ")
            return result
        if self.text.startswith('"', self.at):
            return self.json()
        for literal, constant in (("None", None), ("True", True), ("False", False)):
            if self.take(literal):
                return constant
        return self.call_like()

    def call_like(self) -> Any:
        if self.take("dtype("):
            name = self.match(_NAME, "a dtype")
            self.expect(")")
            return DTYPES[name]
        if self.take("device("):
            name = self.match(re.compile(r"[^)]+"), "a device")
            self.expect(")")
            return torch.device(name)
        if self.take("float("):
            name = self.match(re.compile(r"-?(inf|nan)"), "inf or nan")
            self.expect(")")
            return float(name)
        if self.take("slice("):
            return slice(*self.items(")"))
        if self.take("torch."):
            return getattr(torch, self.match(_NAME, "a layout or memory format"))
        number = self.match(_NUMBER, "a value")
        return int(number) if re.fullmatch(r"-?\d+", number) else float(number)
