"""IR text back to a Program: the inverse of `tfqc.ir.render`.

Text may come from a stranger. It is checked here as it is read: operations against a list and their schemas, names
against patterns, sizes against what machines hold. What is read is data: no attribute is reached by name, and nothing
but what plug-ins are installed is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfqc.errors import IRError
from tfqc.ir.calls import canonical
from tfqc.ir.cursor import NAME, OPERATION, TABLE, Cursor, printable
from tfqc.ir.dims import SYMBOL, holds
from tfqc.ir.ops import is_of_capture, op_by_name
from tfqc.ir.program import BEGIN, STEP, TIME, Input, Origin, Program, Role, Stage, tensor_node_name
from tfqc.ir.render import VERSION
from tfqc.ir.schema import check_call
from tfqc.ir.tables import row_class, row_from_json
from tfqc.ir.types import TensorType, Type, check_size, symbols_of
from tfqc.runtime.outputs import check_structure

_LONGEST_TEXT, _LONGEST_LINE = 1 << 28, 1 << 22
_LARGEST_SYMBOL, _MOST_SYMBOLS = 1 << 31, 32


def parse(text: str, tensors: Mapping[str, Tensor] | None = None) -> Program:
    """Read IR text.

    Args:
        text: what `render` wrote.
        tensors: values of the declared tensors; without them they are on the meta device.

    Raises:
        IRError: the text is malformed (the message names the line and underlines the place), or a tensor is
            missing or of another type than declared.
    """
    if not text.startswith("tfqc-ir "):
        raise IRError("IR line 1: the text does not begin with 'tfqc-ir' and the format's number: it is no IR.")
    if len(text) > _LONGEST_TEXT:
        raise IRError(f"The text has {len(text)} characters: IR has {_LONGEST_TEXT} at most.")
    program = Program({}, {}, ())
    reader = _Reader(program, tensors)
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        line = line.removesuffix("\r")
        try:
            reader.line(line)
        except IRError as error:
            raise IRError(f"IR line {number}: {error}", line[:400], *error.notes) from error
        except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, OverflowError) as error:
            raise IRError(f"IR line {number} is malformed: {str(error)[:400]}.", line[:400]) from error
    if reader.function is not None:
        raise IRError(f"@{reader.function.name} has no closing brace: the text ends inside it.")
    return program


class _Reader:
    """Reads line by line: the header, then functions and tables."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor] | None) -> None:
        self.program, self.given = program, tensors
        self.function: _Function | None = None
        self.table: str | None = None
        self.seen: set[str] = set()  # lines that stand once
        self.header: dict[str, Callable[[str], None]] = {
            "tfqc-ir": self.version, "model": self.model, "stage": self.stage, "symbols": self.symbols,
            "input": self.input, "arguments": self.arguments, "constant": self.constant, "guard": self.guard,
            "outputs": self.outputs,
            "tensor": self.tensor, "func": self.open, "table": self.open_table, "": _nothing,
        }  # fmt: skip

    def line(self, line: str) -> None:
        if len(line) > _LONGEST_LINE:
            raise IRError(f"the line has {len(line)} characters: {_LONGEST_LINE} are as many as lines have.")
        if self.function is not None:
            if self.function.line(line.strip()):
                self.function = None
            return
        if self.table is not None and line.startswith("  "):
            return self.row(self.table, line.strip())
        self.table = None
        word, _, rest = line.partition(" ")
        if word not in self.header:
            raise IRError(f"{word[:80]!r} begins no line of IR text.")
        if word in ("tfqc-ir", "model", "stage", "symbols", "arguments", "outputs"):
            self.once(word)
        self.header[word](rest)

    def once(self, what: str) -> None:
        if what in self.seen:
            raise IRError(f"{what} stands a second time.")
        self.seen.add(what)

    # -- the header ----------------------------------------------------------------------------------------------------

    def version(self, rest: str) -> None:
        if not re.fullmatch(r"[0-9]{1,9}", rest):
            raise IRError(f"{rest[:40]!r} is no format's number.")
        if int(rest) > VERSION:
            raise IRError(f"format {int(rest)} is newer than {VERSION}, which this tfqc reads: upgrade tfqc.")

    def model(self, rest: str) -> None:
        self.program.model = printable(json.loads(rest), "the model's name")

    def stage(self, rest: str) -> None:
        self.program.stage = Stage[rest.upper()]

    def symbols(self, rest: str) -> None:
        for item in rest.split():
            name, _, value = item.partition("=")
            if not SYMBOL.fullmatch(name):
                raise IRError(f"{name[:80]!r} is no symbol: symbols have capitals, digits and underscores.")
            if not (0 < (size := int(value)) <= _LARGEST_SYMBOL and value.isascii()):
                raise IRError(f"{name}={value} is no size: 1 to {_LARGEST_SYMBOL} are.")
            if name in self.program.symbols or len(self.program.symbols) == _MOST_SYMBOLS:
                raise IRError(f"{name} stands a second time, or is one symbol too many ({_MOST_SYMBOLS} are allowed).")
            self.program.symbols[name] = size

    def input(self, rest: str) -> None:
        cursor = Cursor(rest, _no_node, _no_node)
        cursor.expect("%")
        name = cursor.match(NAME, "an input's name")
        cursor.expect(" ")
        role = Role(cursor.match(re.compile(r"[a-z]+"), "a role"))
        cursor.expect(" ")
        path = _path(cursor.json())
        cursor.expect(": ")
        type_ = self.known(cursor.type())
        domain = None
        if cursor.take(" domain="):
            domain = int(cursor.match(re.compile(r"[1-9][0-9]{0,9}"), "a number of values"))
        cursor.end()
        if not isinstance(type_, TensorType):
            raise IRError(f"input %{name} is no tensor.")
        if any(isinstance(d, int) and d < 1 for d in type_.shape):
            raise IRError(f"input %{name} is {type_}, which has no elements.")
        self.once(f"input %{name}")
        if any(i.path == path for i in self.program.inputs):
            raise IRError(f"input %{name} stands at {'.'.join(path)!r}, where another stands.")
        self.program.inputs = (*self.program.inputs, Input(name, role, path, type_, domain))

    def arguments(self, rest: str) -> None:
        self.program.arguments = _path(json.loads(rest))

    def constant(self, rest: str) -> None:
        cursor = Cursor(rest, _no_node, _no_node)
        path = _path(cursor.json())
        cursor.expect(" ")
        value = cursor.json()
        cursor.end()
        if not (value is None or isinstance(value, (bool, float, str)) or type(value) is int):
            raise IRError("a constant is none of null, true, false, a number and a text.")
        if isinstance(value, str):
            printable(value, "a constant")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise IRError("a constant is no number of 64 bits.")
        self.once(f"constant {path}")
        self.program.constants[path] = value

    def guard(self, rest: str) -> None:
        guard = printable(json.loads(rest), "a guard")
        holds(guard, self.program.symbols)
        self.program.guards = (*self.program.guards, guard)

    def outputs(self, rest: str) -> None:
        self.program.outputs = json.loads(rest)
        list(check_structure(self.program.outputs))

    def tensor(self, rest: str) -> None:
        cursor = Cursor(rest, _no_node, _no_node)
        name = cursor.tensor_name()
        cursor.expect(": ")
        type_ = cursor.type()
        cursor.end()
        self.once(f"tensor @{name}")
        if not isinstance(type_, TensorType):
            raise IRError(f"@{name} is declared with type {type_}, which is no tensor's.")
        check_size(type_)
        shape = [d for d in type_.shape if isinstance(d, int)]
        if len(shape) < len(type_.shape):
            raise IRError(f"@{name} is declared {type_}: a tensor that is stored has numbers for sizes.")
        if self.given is None:
            self.program.tensors[name] = torch.empty(shape, dtype=type_.dtype, device="meta")
            return
        if name not in self.given:
            raise IRError(f"no value is stored for tensor @{name}.")
        value = self.given[name]
        if value.dtype != type_.dtype or list(value.shape) != shape:
            raise IRError(f"@{name} is declared {type_}, stored {TensorType(value.dtype, tuple(value.shape))}.")
        self.program.tensors[name] = value

    # -- functions and tables ------------------------------------------------------------------------------------------

    def open(self, rest: str) -> None:
        cursor = Cursor(rest, _no_node, _no_node)
        cursor.expect("@")
        name = cursor.match(NAME, "a function's name")
        if name not in (STEP, TIME, BEGIN):
            raise IRError(f"there is no function @{name}: {STEP}, {TIME} and {BEGIN} are.")
        self.once(f"func @{name}")
        self.function = _Function(self, name)
        self.function.parameters(cursor)

    def open_table(self, rest: str) -> None:
        if not TABLE.fullmatch(rest):
            raise IRError(f"{rest[:80]!r} is no table's name.")
        self.once(f"table {rest}")
        self.table = rest
        self.program.tables.setdefault(rest, {})

    def row(self, table: str, line: str) -> None:
        if line.startswith('"'):
            cursor = Cursor(line, _no_node, _no_node)
            key = printable(cursor.json(), "a row's name")
            value = line[cursor.at :]
        else:
            key, _, value = line.partition(" ")
        self.add_row(table, key, json.loads(value), inline=False)

    def add_row(self, table: str, key: str, value: Any, *, inline: bool) -> None:
        rows = self.program.tables.setdefault(table, {})
        row = row_from_json(row_class(table, inline=inline), value)
        if rows.setdefault(key, row) != row:  # parameters of several functions say the same in each
            raise IRError(f"table {table} has two rows for {key[:80]!r}, which differ.")

    def known(self, type_: Type) -> Type:
        """A type whose symbols the program has."""
        if strange := sorted(symbols_of(type_) - set(self.program.symbols)):
            raise IRError(f"{str(type_)[:80]} has the symbol {strange[0]}, of which the program says no size.")
        if isinstance(type_, TensorType):
            check_size(type_)
        return type_


class _Function:
    """Reads one function."""

    def __init__(self, reader: _Reader, name: str) -> None:
        self.reader, self.program, self.name = reader, reader.program, name
        self.graph = fx.Graph()
        self.env: dict[str, fx.Node] = {}
        self.reads: dict[str, fx.Node] = {}  # of tensors
        self.first: fx.Node | None = None  # behind the parameters: what reads a tensor is put before it
        self.returned = False

    def parameters(self, cursor: Cursor) -> None:
        cursor.expect("(")
        while not cursor.take(")"):
            cursor.expect("%")
            name = cursor.match(NAME, "a parameter's name")
            cursor.expect(": ")
            self.declare(name, cursor.type())
            self.define(name, self.graph.create_node("placeholder", name, name=name))
            cursor.comma()
        cursor.expect(" {")
        cursor.end()

    def line(self, line: str) -> bool:
        """Read a line; True if it was the last."""
        if line == "}":
            self.program.functions[self.name] = self.graph
            return True
        cursor = Cursor(line, self.node, self.tensor)
        if self.returned:
            raise IRError("nothing stands behind 'return' but '}'.")
        if cursor.take("return "):
            self.graph.output(cursor.value())
            self.returned = True
        elif cursor.take("note %"):
            node = self.node(cursor.match(NAME, "a parameter's name"))
            self.attributes(cursor, node.name)
        elif cursor.take("%"):
            self.operation(cursor)
        else:
            raise IRError("inside a function a line is '%name: type = op(...)', 'note %name', 'return ...' or '}'.")
        cursor.end()
        return False

    def operation(self, cursor: Cursor) -> None:
        name = cursor.match(NAME, "a node's name")
        cursor.expect(": ")
        type_ = cursor.type()
        cursor.expect(" = ")
        target = op_by_name(cursor.match(OPERATION, "an operation"))
        cursor.expect("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while not cursor.take(")"):
            if keyword := cursor.keyword():
                if keyword in kwargs:
                    raise IRError(f"operand {keyword!r} is given twice.")
                kwargs[keyword] = cursor.value()
            elif kwargs:
                raise cursor.fail("a keyword")
            else:
                args.append(cursor.value())
            cursor.comma()
        if self.program.stage > Stage.CAPTURED and is_of_capture(target):
            raise IRError(f"{target} works in place or has no value: only captured programs have such operations.")
        check_call(target, tuple(args), kwargs, self.program.types)
        self.declare(name, type_)
        node = self.graph.create_node("call_function", target, *canonical(target, args, kwargs), name=name)
        self.first = self.first or node
        self.define(name, node)
        self.attributes(cursor, name)

    def declare(self, name: str, type_: Type) -> None:
        self.reader.known(type_)
        if self.program.types.setdefault(name, type_) != type_:
            raise IRError(f"%{name} is defined twice, as {self.program.types[name]} and as {type_}.")

    def define(self, name: str, node: fx.Node) -> None:
        if node.name != name or name in self.env:
            raise IRError(f"%{name} is defined twice, or is a word that Python reserves.")
        self.env[name] = node

    def node(self, name: str) -> fx.Node:
        if name not in self.env:
            raise IRError(f"%{name} is read before it is defined.")
        return self.env[name]

    def tensor(self, name: str) -> fx.Node:
        if name in self.reads:
            return self.reads[name]
        if name not in self.program.tensors:
            raise IRError(f"tensor @{name} is not declared.")
        before = self.first.prepend if self.first else lambda _: None
        node = self.graph.create_node("get_attr", name, name=tensor_node_name(name))
        before(node)
        self.first = self.reads[name] = node
        tensor = self.program.tensors[name]
        self.program.types[node.name] = TensorType(tensor.dtype, tuple(tensor.shape))
        return node

    def attributes(self, cursor: Cursor, name: str) -> None:
        if not cursor.take("   {"):
            return
        origin: dict[str, str] = {}
        while not cursor.take("}"):
            key = cursor.match(TABLE, "an attribute's name")
            cursor.expect("=")
            value = cursor.json()
            if key in ("at", "src"):
                if key in origin:
                    raise IRError(f"{key}= stands twice.")
                origin[key] = printable(value, f"{key}=")
            else:
                self.reader.add_row(key, name, value, inline=True)
            cursor.take(" ")
        if any(origin.values()):
            self.program.origins[name] = Origin(origin.get("at", ""), origin.get("src", ""))


def _path(value: Any) -> tuple[str, ...]:
    """Names of arguments, or of keys on the way to one."""
    if not isinstance(value, list) or not 0 < len(value) <= 4096:
        raise IRError("a list of names was expected.")
    return tuple(printable(v, "a name") for v in value)


def _no_node(name: str) -> fx.Node:
    raise IRError(f"{name!r} stands where no value can be.")


def _nothing(rest: str) -> None:
    if rest.strip():
        raise IRError(f"{rest.strip()[:80]!r} begins no line of IR text.")
