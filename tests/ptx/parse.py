"""PTX text to its parts. What is not understood is an error, never skipped."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from tests.ptx.errors import PtxError
from tests.ptx.scalars import WIDTHS
from tests.ptx.syntax import (
    Imm,
    Instruction,
    Kernel,
    Label,
    Memory,
    Module,
    Not,
    Operand,
    Pair,
    Reg,
    Sink,
    Symbol,
    Variable,
    Vector,
)

IGNORED = (".version", ".target", ".address_size", ".file", ".loc", ".pragma")
TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      |(?P<word>[.%$A-Za-z_][\w$.%:]*)
      |(?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+U?)
      |(?P<text>"[^"]*")
      |(?P<mark>[-+{}()\[\],;|!@<>=*])""",
    re.VERBOSE | re.DOTALL,
)
DECLARED = re.compile(r"^\.(reg|shared|global|const|local|param)$")


class Tokens:
    """The words of a text with their lines; comments and space are gone."""

    def __init__(self, text: str) -> None:
        self.words: list[tuple[str, int]] = []
        self.position = 0
        at, line = 0, 1
        while at < len(text):
            match = TOKEN.match(text, at)
            if not match:
                raise PtxError(f"cannot read {text[at : at + 20]!r}", "PTX text", line, text[at : at + 20])
            word = match.group()
            if match.lastgroup == "word" and word.endswith(":") and not word.endswith("::"):
                self.words += [(word[:-1], line), (":", line)]
            elif word[0] == "." and match.lastgroup == "word":  # directives may stand without space: `.reg.b32`
                self.words += [(f".{part}", line) for part in word[1:].split(".")]
            elif match.lastgroup != "space":
                self.words.append((word, line))
            line += word.count("\n")
            at = match.end()

    @property
    def more(self) -> bool:
        return self.position < len(self.words)

    @property
    def word(self) -> str:
        return self.words[self.position][0] if self.more else ""

    @property
    def line(self) -> int:
        return self.words[min(self.position, len(self.words) - 1)][1]

    def after(self) -> str:
        """The word behind this one."""
        return self.words[self.position + 1][0] if self.position + 1 < len(self.words) else ""

    def take(self, expected: str | None = None) -> str:
        word = self.word
        if not word or (expected is not None and word != expected):
            self.fail(f"expected {expected!r}, got {word!r}")
        self.position += 1
        return word

    def accept(self, word: str) -> bool:
        found = self.word == word
        self.position += found
        return found

    def fail(self, message: str) -> None:
        text = " ".join(word for word, line in self.words if line == self.line)
        raise PtxError(message, "PTX text", self.line, text)

    def skip_to(self, end: str) -> None:
        while self.take() != end:
            pass


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """The module of a text; cached, so not to be changed."""
    tokens, module = Tokens(text), Module()
    while tokens.more:
        if tokens.word in IGNORED:
            _skip_directive(tokens)
        elif tokens.word == ".section" or tokens.word == ".func":
            _skip_block(tokens)
        elif tokens.accept(".visible") or tokens.accept(".weak"):
            pass
        elif tokens.accept(".entry"):
            kernel = _entry(tokens)
            module.kernels[kernel.name] = kernel
        elif tokens.word == ".extern" or DECLARED.match(tokens.word):
            module.variables.append(_variable(tokens))
            tokens.take(";")
        else:
            tokens.fail(f"unknown directive {tokens.word!r}")
    return module


def _skip_directive(tokens: Tokens) -> None:
    line = tokens.line
    while tokens.more and tokens.line == line:
        tokens.take()


def _skip_block(tokens: Tokens) -> None:
    """A function or a section of debug information: nothing that a kernel here may use."""
    while tokens.word not in ("{", ";"):
        tokens.take()
    depth = 0
    while True:
        word = tokens.take()
        depth += {"{": 1, "}": -1}.get(word, 0)
        if depth == 0 and word in ("}", ";"):
            return


def _variable(tokens: Tokens) -> Variable:
    extern = tokens.accept(".extern")
    space, align, kind = tokens.take()[1:], 0, ""
    while tokens.word.startswith("."):
        word = tokens.take()
        if word == ".align":
            align = int(tokens.take())
        elif word not in (".ptr", ".global", ".shared", ".const", ".local"):
            kind = word[1:]
    if kind not in WIDTHS:
        tokens.fail(f"unknown type {kind!r}")
    name, count, width = tokens.take(), 1, WIDTHS[kind]
    while tokens.accept("["):
        count *= int(tokens.take()) if tokens.word != "]" else 0
        tokens.take("]")
    data = _initial(tokens, kind, width) if tokens.accept("=") else b""
    return Variable(name, space, count * width, align or width, data.ljust(count * width, b"\0"), extern)


def _initial(tokens: Tokens, kind: str, width: int) -> bytes:
    """The bytes of an initialiser: numbers only."""
    numbers: list[Imm] = []
    if tokens.accept("{"):
        while not tokens.accept("}"):
            numbers.append(_number(tokens))
            tokens.accept(",")
    else:
        numbers.append(_number(tokens))
    return b"".join((n.value % (1 << 8 * width)).to_bytes(width, "little") for n in numbers)


def _entry(tokens: Tokens) -> Kernel:
    kernel = Kernel(tokens.take())
    if tokens.accept("("):
        while not tokens.accept(")"):
            kernel.params.append(_variable(tokens))
            tokens.accept(",")
    while tokens.word != "{":
        word = tokens.take()
        if word in (".maxntid", ".reqntid"):
            sizes = [int(tokens.take())]
            while tokens.accept(","):
                sizes.append(int(tokens.take()))
            kernel.max_threads = functools.reduce(lambda a, b: a * b, sizes)
        elif word in (".minnctapersm", ".maxnreg", ".maxnctapersm"):
            tokens.take()
        elif word not in (".noreturn", ".pragma"):
            tokens.fail(f"unknown directive {word!r}")
    _block(tokens, kernel, {})
    return kernel


def _block(tokens: Tokens, kernel: Kernel, outer: dict[str, str]) -> None:
    """A `{ ... }` of declarations and instructions; `outer` has the names of what is declared around it."""
    scope = dict(outer)
    tokens.take("{")
    while not tokens.accept("}"):
        if tokens.word == "{":
            _block(tokens, kernel, scope)
        elif tokens.after() == ":":
            kernel.labels[tokens.take()] = len(kernel.body)
            tokens.take(":")
        elif tokens.word == ".reg":
            _registers(tokens, kernel, scope)
        elif tokens.word in IGNORED:
            _skip_directive(tokens)
        elif DECLARED.match(tokens.word):
            kernel.variables.append(_variable(tokens))
            tokens.take(";")
        elif not tokens.accept(";"):
            kernel.body.append(_instruction(tokens, scope))


def _registers(tokens: Tokens, kernel: Kernel, scope: dict[str, str]) -> None:
    tokens.take(".reg")
    kind = tokens.take()[1:]
    while True:
        name = tokens.take()
        names = [name]
        if tokens.accept("<"):
            names = [f"{name}{i}" for i in range(int(tokens.take()))]
            tokens.take(">")
        for each in names:
            unique = each if each not in kernel.registers else f"{each}'{len(kernel.registers)}"
            scope[each], kernel.registers[unique] = unique, kind
        if not tokens.accept(","):
            break
    tokens.take(";")


def _instruction(tokens: Tokens, scope: dict[str, str]) -> Instruction:
    start, line = tokens.position, tokens.line
    guard, negated = None, False
    if tokens.accept("@"):
        negated = tokens.accept("!")
        guard = _register(tokens, scope)
    opcode = tokens.take()
    jumps = opcode.split(".")[0] == "bra"
    operands: list[Operand] = []
    if opcode.split(".")[0] == "call":  # not supported, but by the kernel that does it alone
        tokens.skip_to(";")
        return Instruction(opcode, (), line, opcode, guard, negated)
    while not tokens.accept(";"):
        operands.append(Label(tokens.take()) if jumps else _operand(tokens, scope))
        if tokens.word != ";":
            tokens.take(",")
    text = "".join(_spaced(word) for word, _ in tokens.words[start : tokens.position - 1]).strip()
    return Instruction(opcode, tuple(operands), line, text, guard, negated)


def _register(tokens: Tokens, scope: dict[str, str]) -> Reg:
    if tokens.word not in scope:
        tokens.fail(f"{tokens.word!r} is not a register")
    return Reg(scope[tokens.take()])


def _spaced(word: str) -> str:
    return f"{word} " if word[0].isalpha() or word == "," else word


def _operand(tokens: Tokens, scope: dict[str, str]) -> Operand:
    if tokens.accept("{"):
        return Vector(tuple(_items(tokens, scope, "}")))
    if tokens.accept("["):
        base, offset = _simple(tokens, scope), 0
        while tokens.word in ("+", "-"):
            offset += _signed(tokens)
        tokens.take("]")
        if not isinstance(base, Reg | Symbol | Imm):
            tokens.fail("not an address")
        return Memory(base, offset)  # type: ignore[arg-type]
    if tokens.accept("!"):
        return Not(_register(tokens, scope))
    first = _simple(tokens, scope)
    return Pair(first, _simple(tokens, scope)) if tokens.accept("|") else first


def _items(tokens: Tokens, scope: dict[str, str], end: str) -> Iterator[Operand]:
    while not tokens.accept(end):
        yield _simple(tokens, scope)
        tokens.accept(",")


def _signed(tokens: Tokens) -> int:
    sign = 1
    while tokens.word in ("+", "-"):
        sign *= -1 if tokens.take() == "-" else 1
    return sign * _number(tokens).value


def _number(tokens: Tokens) -> Imm:
    sign = -1 if tokens.accept("-") else 1
    word = tokens.take().rstrip("U")
    if word[:2] in ("0f", "0F", "0d", "0D"):
        return Imm(int(word[2:], 16), 32 if word[1] in "fF" else 64)
    if not word[0].isdigit():
        tokens.fail(f"{word!r} is not a number")
    return Imm(sign * int(word, 0))


def _simple(tokens: Tokens, scope: dict[str, str]) -> Operand:
    word = tokens.word
    if word == "_":
        tokens.take()
        return Sink()
    if word == "-" or word[:1].isdigit():
        return _number(tokens)
    tokens.take()
    if word in scope:
        return Reg(scope[word])
    if word == "WARP_SZ":
        return Imm(32)
    if word.startswith("%"):
        return Reg(word)
    return Symbol(word, _signed(tokens) if tokens.word in ("+", "-") else 0)
