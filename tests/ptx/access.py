"""Loads, stores, cp.async and ldmatrix: instructions on memory, checked and counted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.ptx.bind import require
from tests.ptx.block import Block, Execute
from tests.ptx.counters import LineCount, count_sectors, count_wavefronts
from tests.ptx.errors import FaultError
from tests.ptx.memory import GLOBAL_BASE, LOCAL_WINDOW, SHARED_WINDOW, WINDOW, Addresses, Bytes, Index
from tests.ptx.mma import ldmatrix_gather
from tests.ptx.plans import Mods
from tests.ptx.registers import WARP, Lanes, Register
from tests.ptx.scalars import DTYPES, WIDTHS, narrow, storage, widen
from tests.ptx.syntax import Imm, Instruction, Memory, Operand, Sink, Vector

CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L2::64B", "L2::128B", "L2::256B", "L1::no_allocate",
         "L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::evict_unchanged")  # fmt: skip
ORDER = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys")
SPACES = ("global", "shared", "shared::cta", "local", "param", "const")


def take_space(m: Mods) -> str:
    """The state space; takes what says how to cache or order along with it, which nothing here depends on."""
    for name in (*ORDER, *CACHE):
        m.flag(name)
    return m.one_of(*SPACES, default="generic").removesuffix("::cta")


class Address:
    """Where an operand points, in each thread."""

    def __init__(self, block: Block, operand: Operand) -> None:
        if not isinstance(operand, Memory):
            raise FaultError(f"{operand} is not an address")
        bits, register = block.bits(operand.base, 8)
        self.registers: list[Register] = [register] if register is not None else []
        self._bits, self._offset = bits, operand.offset

    def of(self, lanes: Index) -> Addresses:
        return self._bits[lanes].astype(np.int64) + self._offset


class Accessor:
    """Loads and stores of bytes in one state space, or by generic addresses."""

    def __init__(self, block: Block, space: str, count: LineCount) -> None:
        self.block, self.space, self.count = block, space, count

    def spaces(self, address: Addresses, lanes: Index) -> list[tuple[str, NDArray[np.bool_] | None, int]]:
        """Which accesses (none: all) are to which space, and what to subtract from their addresses."""
        if self.space != "generic":
            return [(self.space, None, 0)]
        parts = {
            "local": ((address >= LOCAL_WINDOW) & (address < LOCAL_WINDOW + WINDOW), LOCAL_WINDOW),
            "shared": ((address >= SHARED_WINDOW) & (address < SHARED_WINDOW + WINDOW), SHARED_WINDOW),
            "generic": (address >= GLOBAL_BASE, 0),
        }
        known = np.logical_or.reduce([mask for mask, _ in parts.values()])
        if not known.all():
            at = int(np.flatnonzero(~known)[0])
            raise FaultError(f"generic address {int(address[at]):#x} is no memory", int(lanes[at]))
        return [(space, mask, base) for space, (mask, base) in parts.items() if mask.any()]

    def load(self, address: Addresses, width: int, lanes: Index) -> Bytes:
        """[lanes, width]."""
        result = np.zeros((lanes.size, width), np.uint8)
        for space, mask, base in self.spaces(address, lanes):
            chosen = slice(None) if mask is None else mask
            at, who = address[chosen] - base, lanes[chosen]
            if space == "shared":
                result[chosen] = self.block.shared.load(at, width, who)
                self.note_wavefronts(at, width, who)
            elif space == "local":
                result[chosen] = self.block.local.load(at, width, who)
            else:
                rows = self.block.memory.locate(at, width, who, space, writes=False)
                result[chosen] = self.block.memory.bytes.reshape(-1, width)[rows]
                self.note_sectors(space, at, width, who)
        return result

    def store(self, address: Addresses, values: Bytes, lanes: Index) -> None:
        width = values.shape[1]
        for space, mask, base in self.spaces(address, lanes):
            chosen = slice(None) if mask is None else mask
            at, who = address[chosen] - base, lanes[chosen]
            if space == "shared":
                self.block.shared.store(at, values[chosen], who)
                self.note_wavefronts(at, width, who)
            elif space == "local":
                self.block.local.store(at, values[chosen], who)
            else:
                rows = self.block.memory.locate(at, width, who, space, writes=True)
                self.block.memory.bytes.reshape(-1, width)[rows] = values[chosen]
                self.note_sectors(space, at, width, who)

    def note_wavefronts(self, address: Addresses, width: int, lanes: Index) -> None:
        ideal, real = count_wavefronts(address, width, lanes)
        self.count.ideal_wavefronts += ideal
        self.count.wavefronts += real

    def note_sectors(self, space: str, address: Addresses, width: int, lanes: Index) -> None:
        if space in ("global", "generic"):
            ideal, real = count_sectors(address, width, lanes)
            self.count.ideal_sectors += ideal
            self.count.sectors += real


def _items(operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise FaultError(f"{len(items)} registers instead of {count}")
    return items


def bind_ld(block: Block, instruction: Instruction, count: LineCount) -> Execute:
    m = Mods("ld", instruction.mods)
    space = take_space(m)
    length = int(m.one_of("v2", "v4", default="v1")[1:])
    kind = m.kind()
    m.done()
    target, source = instruction.operands
    targets = [None if isinstance(t, Sink) else block.register(t) for t in _items(target, length)]
    if any(t is not None and t.bits.itemsize < WIDTHS[kind] for t in targets):
        raise FaultError(f"a register is narrower than {kind}")
    address, accessor = Address(block, source), Accessor(block, space, count)

    def execute(lanes: Lanes) -> None:
        require(address.registers, lanes)
        read = accessor.load(address.of(lanes.index), WIDTHS[kind] * length, lanes.index)
        values = read.view(DTYPES[kind]).reshape(lanes.index.size, length, -1)
        for position, register in enumerate(targets):
            if register is not None:
                column = np.ascontiguousarray(values[:, position]).ravel()
                block.put(register, widen(column, kind, register.bits.dtype), lanes)

    return execute


def bind_st(block: Block, instruction: Instruction, count: LineCount) -> Execute:
    m = Mods("st", instruction.mods)
    space = take_space(m)
    length = int(m.one_of("v2", "v4", default="v1")[1:])
    kind = m.kind()
    m.done()
    target, source = instruction.operands
    sources = [block.bits(s, WIDTHS[kind]) for s in _items(source, length)]
    if any(bits.itemsize < WIDTHS[kind] for bits, _ in sources):
        raise FaultError(f"a register is narrower than {kind}")
    address, accessor = Address(block, target), Accessor(block, space, count)
    registers = [*address.registers, *(r for _, r in sources if r is not None)]

    def execute(lanes: Lanes) -> None:
        require(registers, lanes)
        columns = [narrow(bits[lanes.index], kind).view(storage(kind)) for bits, _ in sources]
        values = np.stack(columns, 1).view(np.uint8)
        accessor.store(address.of(lanes.index), values, lanes.index)

    return execute


def bind_cp_async(block: Block, instruction: Instruction, count: LineCount) -> Execute:
    """cp.async of 4, 8 or 16 bytes, of which only the first src-size are read and the others are zero."""
    m = Mods("cp", instruction.mods)
    m.one_of("async")
    if m.flag("commit_group"):
        m.done()
        return lambda lanes: block.shared.commit(lanes.index)
    if m.flag("wait_group"):
        m.done()
        allowed = _constant(instruction.operands[0])
        return lambda lanes: block.shared.wait(lanes.index, allowed)
    if m.flag("wait_all"):
        m.done()
        return lambda lanes: (block.shared.commit(lanes.index), block.shared.wait(lanes.index, 0))[1]
    whole = m.one_of("ca", "cg") == "cg"
    for name in ("L2::64B", "L2::128B", "L2::256B"):
        m.flag(name)
    m.one_of("shared", "shared::cta")
    m.one_of("global")
    m.done()
    width = _constant(instruction.operands[2])
    if width not in ((16,) if whole else (4, 8, 16)) or len(instruction.operands) > 4:
        raise FaultError(f"unknown instruction: cp.async of {width} bytes with {len(instruction.operands)} operands")
    target, source = Address(block, instruction.operands[0]), Address(block, instruction.operands[1])
    sizes, register = block.source(instruction.operands[3] if len(instruction.operands) == 4 else Imm(width), "u32")
    registers = [*target.registers, *source.registers, *([register] if register is not None else [])]
    accessor = Accessor(block, "global", count)

    def execute(lanes: Lanes) -> None:
        require(registers, lanes)
        index = lanes.index
        size, start = sizes[index], source.of(index)
        if (size > width).any():
            raise FaultError(f"src-size is more than {width}", int(index[np.flatnonzero(size > width)[0]]))
        values = np.zeros((index.size, width), np.uint8)
        full = size == width
        if full.any():
            values[full] = accessor.load(start[full], width, index[full])
        for at in np.flatnonzero(~full & (size > 0)):
            block.memory.locate(start[[at]] & ~(width - 1), 1, index[[at]], "global", writes=False)
            bytes_ = start[at] + np.arange(size[at])
            values[at, : size[at]] = accessor.load(bytes_, 1, np.repeat(index[at], size[at]))[:, 0]
        to = target.of(index)
        block.shared.copy(to, values, index)
        accessor.note_wavefronts(to, width, index)

    return execute


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Imm):
        raise FaultError(f"{operand} is not a constant")
    return operand.value


def bind_ldmatrix(block: Block, instruction: Instruction, count: LineCount) -> Execute:
    m = Mods("ldmatrix", instruction.mods)
    m.one_of("sync")
    m.one_of("aligned")
    m.one_of("m8n8")
    number = int(m.one_of("x1", "x2", "x4")[1:])
    transposed = m.flag("trans")
    m.one_of("shared", "shared::cta")
    m.kind("b16")
    m.done()
    targets = [block.register(t) for t in _items(instruction.operands[0], number)]
    address, accessor = Address(block, instruction.operands[1]), Accessor(block, "shared", count)
    gather = ldmatrix_gather(transposed)

    def execute(lanes: Lanes) -> None:
        lanes.require_whole_warps("ldmatrix")
        used = lanes.index.reshape(-1, WARP)[:, : 8 * number].ravel()
        require(address.registers, lanes.where(block.index % WARP < 8 * number))
        at = address.of(used)
        rows = block.shared.load(at, 16, used, for_others=True)
        accessor.note_wavefronts(at, 16, used)
        elements = rows.view(np.uint16).reshape(-1, number, 64)[:, :, gather]
        fragments = np.ascontiguousarray(elements).view(np.uint32).reshape(-1, number, WARP)
        for position, register in enumerate(targets):
            block.put(register, fragments[:, position].ravel(), lanes)

    return execute
