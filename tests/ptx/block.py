"""The state of one block of threads, and how instructions reach it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import FaultError
from tests.ptx.memory import GlobalMemory, LocalMemory
from tests.ptx.registers import WARP, Lanes, Register
from tests.ptx.scalars import DTYPES, UNSIGNED, WIDTHS, Array
from tests.ptx.shared import SharedMemory
from tests.ptx.syntax import Imm, Kernel, Operand, Reg, Symbol, Variable

Size = tuple[int, int, int]
Execute = Callable[[Lanes], None]


class Block:
    """Registers and memory of the threads of a block, which is reused for the blocks of a grid one after the other.

    There are whole warps of threads; those beyond the size of the block never live. A thread is named by its index.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Size,
        size: Size,
        memory: GlobalMemory,
        symbols: dict[str, int],
        shared: list[Variable],
        shared_bytes: int,
    ) -> None:
        self.kernel, self.grid, self.size, self.memory = kernel, grid, size, memory
        self._shared, self._shared_bytes = shared, shared_bytes
        self.count = size[0] * size[1] * size[2]
        self.threads = -(-self.count // WARP) * WARP
        self.index = np.arange(self.threads)
        self.registers = {name: Register(name, kind, self.threads) for name, kind in kernel.registers.items()}
        self.symbols = dict(symbols)
        end = 0
        for variable in (v for v in kernel.variables if v.space == "local"):
            end += -end % max(variable.align, 16)
            self.symbols[variable.name] = end
            end += variable.size
        self._local_bytes = end
        self._special: dict[str, NDArray[np.uint32]] = {}
        self.start((0, 0, 0))
        self.symbols |= self.shared.addresses

    def start(self, at: Size) -> None:
        """Makes it the block at this place of the grid, before its first instruction."""
        self.at = at
        self.live = self.index < self.count
        self.shared = SharedMemory(self._shared, self._shared_bytes, self.threads)
        self.local = LocalMemory(self._local_bytes, self.threads)
        for register in self.registers.values():
            register.forget()
        for name, values in self._special.items():
            values[:] = self._read_special(name)

    def name(self, thread: int) -> str:
        x, y, _ = self.size
        place = (thread % x, thread // x % y, thread // (x * y))
        return f"block {self.at} thread {place} (warp {thread // WARP} lane {thread % WARP})"

    def _read_special(self, name: str) -> NDArray[np.int64] | int:
        lane = self.index % WARP
        one = np.int64(1)
        x, y, _ = self.size
        places = {"x": self.index % x, "y": self.index // x % y, "z": self.index // (x * y)}
        base, _, axis = name[1:].partition(".")
        if base == "tid" and axis in places:
            return places[axis]
        if base in ("ntid", "ctaid", "nctaid") and axis in places:
            return {"ntid": self.size, "ctaid": self.at, "nctaid": self.grid}[base]["xyz".index(axis)]
        values = {
            "laneid": lane,
            "warpid": self.index // WARP,
            "nwarpid": self.threads // WARP,
            "dynamic_smem_size": self._shared_bytes,
            "lanemask_eq": one << lane,
            "lanemask_lt": (one << lane) - 1,
            "lanemask_le": (one << lane + 1) - 1,
            "lanemask_gt": (1 << 32) - (one << lane + 1),
            "lanemask_ge": (1 << 32) - (one << lane),
        }
        if name[1:] not in values:
            raise FaultError(f"unknown special register {name}")
        return values[name[1:]]

    # -- operands ----------------------------------------------------------------------------------------------

    def register(self, operand: Operand) -> Register:
        """The register that an instruction writes or reads."""
        if not isinstance(operand, Reg) or operand.name not in self.registers:
            raise FaultError(f"{operand} is not a register")
        return self.registers[operand.name]

    def bits(self, operand: Operand, width: int) -> tuple[Array, Register | None]:
        """The bits of a source in each thread, and the register that they are in; constants have that width."""
        if isinstance(operand, Reg) and operand.name in self.registers:
            register = self.registers[operand.name]
            return register.bits, register
        if isinstance(operand, Reg):
            if operand.name not in self._special:
                values = np.zeros(self.threads, np.uint32)
                values[:] = self._read_special(operand.name)
                self._special[operand.name] = values
            return self._special[operand.name], None
        if isinstance(operand, Symbol):
            value = self.address(operand)
        elif isinstance(operand, Imm):
            value = operand.value
        else:
            raise FaultError(f"{operand} cannot be a source here")
        return np.full(self.threads, value % (1 << 8 * width), np.uint64).astype(UNSIGNED[width]), None

    def address(self, symbol: Symbol) -> int:
        if symbol.name not in self.symbols:
            raise FaultError(f"unknown symbol {symbol.name}")
        return self.symbols[symbol.name] + symbol.offset

    def source(self, operand: Operand, kind: str) -> tuple[Array, Register | None]:
        """The same as values of a type, which must be as wide as the register."""
        if isinstance(operand, Imm) and kind == "pred":
            return np.full(self.threads, bool(operand.value)), None
        if isinstance(operand, Imm) and operand.float_bits and operand.float_bits != 8 * WIDTHS[kind]:
            raise FaultError(f"a number of {operand.float_bits} bits as {kind}")
        bits, register = self.bits(operand, WIDTHS[kind])
        if bits.dtype.itemsize != WIDTHS[kind] or (bits.dtype == np.bool_) != (kind == "pred"):
            raise FaultError(f"{operand} is not as wide as {kind}")
        return bits.view(DTYPES[kind]), register

    def put(self, register: Register, values: Array, lanes: Lanes) -> None:
        """Bits for the active threads only, in their order."""
        if lanes.full:
            register.write(values, lanes)
            return
        bits = register.bits.copy()
        bits[lanes.index] = values
        register.write(bits, lanes)
