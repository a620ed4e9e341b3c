"""The parts of a PTX text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reg:
    """A register of the kernel, by a name that is unique in it, or a special register (`%tid.x`)."""

    name: str


@dataclass(frozen=True)
class Imm:
    """A number: an int, or the bits of a float literal with their width."""

    value: int
    float_bits: int = 0  # 32 or 64 for 0f... and 0d...


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter plus bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Memory:
    """`[base+offset]`."""

    base: Reg | Symbol | Imm
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`d|p`: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """`!p` as a source."""

    reg: Reg


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Sink:
    """`_`: a destination that nobody reads."""


Operand = Reg | Imm | Symbol | Memory | Vector | Pair | Not | Label | Sink


@dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` as written, `mods` are its parts after the first."""

    opcode: str
    operands: tuple[Operand, ...]
    line: int
    text: str
    guard: Reg | None = None
    negated: bool = False

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def mods(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])


@dataclass(frozen=True)
class Variable:
    """Memory that the text declares: a parameter, or something in .shared, .global, .const or .local."""

    name: str
    space: str
    size: int
    align: int
    data: bytes = b""
    extern: bool = False


@dataclass
class Kernel:
    name: str
    params: list[Variable] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)  # unique name -> type
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index into body
    max_threads: int = 1024


@dataclass
class Module:
    """All kernels of a text and the variables that they share."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
