"""A launch of a kernel on host arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tests.ptx.block import Block, Size
from tests.ptx.counters import Counters
from tests.ptx.errors import PtxError
from tests.ptx.flow import arrange
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import parse
from tests.ptx.syntax import Kernel, Memory, Module, Operand, Pair, Symbol, Variable, Vector

LIMIT = 1_000_000  # steps of one block


class Struct:
    """A struct that is passed by value: scalars, arrays as pointers to them, structs; laid out as C does."""

    def __init__(self, fields: Sequence[np.ndarray | np.generic | Struct]) -> None:
        self.fields = tuple(fields)


class _Arguments:
    """Device buffers for the arrays among the arguments, one for each array however often it is passed."""

    def __init__(self, memory: GlobalMemory, kernel: str) -> None:
        self._memory, self._kernel = memory, kernel
        self._arrays: list[tuple[np.ndarray, int]] = []

    def encode(self, value: np.ndarray | np.generic | Struct, name: str) -> tuple[bytes, int]:
        """The bytes of an argument and their alignment."""
        if isinstance(value, Struct):
            content, most = b"", 1
            for position, field in enumerate(value.fields):
                part, align = self.encode(field, f"{name}.{position}")
                content += bytes(-len(content) % align) + part
                most = max(most, align)
            return content + bytes(-len(content) % most), most
        if isinstance(value, np.ndarray):
            return self._address(value, name).to_bytes(8, "little"), 8
        if isinstance(value, np.generic):
            return value.tobytes(), value.dtype.alignment
        raise PtxError(f"{name} is a {type(value).__name__}: pass arrays, numpy scalars or a Struct", self._kernel)

    def _address(self, array: np.ndarray, name: str) -> int:
        for other, address in self._arrays:
            if other is array:
                return address
            if np.may_share_memory(other, array):
                raise PtxError(f"{name} overlaps another argument", self._kernel)
        if not array.flags.c_contiguous:
            raise PtxError(f"{name} is not contiguous", self._kernel)
        content = array.reshape(-1).view(np.uint8)
        address = self._memory.add(name, "global", content, writable=array.flags.writeable)
        self._arrays.append((array, address))
        return address

    def write_back(self) -> None:
        by_address = {buffer.address: buffer for buffer in self._memory.buffers}
        for array, address in self._arrays:
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = self._memory.content(by_address[address])


def _names(operand: Operand) -> Iterable[str]:
    match operand:
        case Symbol(name=name) | Memory(base=Symbol(name=name)):
            yield name
        case Vector(items=items):
            for item in items:
                yield from _names(item)
        case Pair(first=first, second=second):
            yield from (*_names(first), *_names(second))
        case _:
            pass


def _variables(module: Module, kernel: Kernel) -> list[Variable]:
    """Its own, and those of the module that it mentions."""
    used = {name for each in kernel.body for operand in each.operands for name in _names(operand)}
    return [*kernel.variables, *(v for v in module.variables if v.name in used)]


def run(
    ptx: str,
    kernel: str,
    grid: Size,
    block: Size,
    args: Sequence[np.ndarray | np.generic | Struct],
    shared_bytes: int = 0,
    *,
    blocks: Iterable[Size] | None = None,
    limit: int = LIMIT,
) -> Counters:
    """Runs a kernel of a PTX text and counts what it does; `blocks` has the only blocks of the grid to run.

    Arrays are device buffers, written back in place when the kernel has ended; one that is not writeable may not be
    written. numpy scalars and `Struct`s are passed by value; no pointer is np.uint64(0). Raises `PtxError`.
    """
    module = parse(ptx)
    if kernel not in module.kernels:
        raise PtxError(f"is not in the text, which has {', '.join(module.kernels) or 'no kernel'}", kernel)
    its = module.kernels[kernel]
    count = block[0] * block[1] * block[2]
    if not 0 < count <= its.max_threads:
        raise PtxError(f"{count} threads in a block of at most {its.max_threads}", kernel)
    if len(args) != len(its.params):
        raise PtxError(f"{len(args)} arguments for {len(its.params)} parameters", kernel)
    memory = GlobalMemory()
    arguments, symbols = _Arguments(memory, kernel), {}
    for position, (value, param) in enumerate(zip(args, its.params, strict=True)):
        content, _ = arguments.encode(value, f"argument {position}")
        if len(content) != param.size:
            raise PtxError(f"argument {position} has {len(content)} bytes, the parameter {param.size}", kernel)
        symbols[param.name] = memory.add(f"parameter {position}", "param", np.frombuffer(content, np.uint8), False)
    variables = _variables(module, its)
    for variable in (v for v in variables if v.space in ("global", "const")):
        content = np.frombuffer(variable.data, np.uint8)
        symbols[variable.name] = memory.add(variable.name, variable.space, content, variable.space == "global")
    memory.freeze()
    counters = Counters()
    with np.errstate(all="ignore"):
        state = Block(its, grid, block, memory, symbols, [v for v in variables if v.space == "shared"], shared_bytes)
        machine = Machine(state, arrange(its), limit)
        everywhere = ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0]))
        for at in everywhere if blocks is None else blocks:
            state.start(at)
            machine.run()
    arguments.write_back()
    for line, each in machine.counts:
        counters.note(line, each)
    return counters
