"""Instructions that the threads of a warp execute together: mma, shuffles, votes, reductions and atomics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.access import Accessor, Address, take_space
from tests.ptx.bind import require
from tests.ptx.block import Block, Execute
from tests.ptx.counters import LineCount
from tests.ptx.errors import FaultError
from tests.ptx.mma import product
from tests.ptx.plans import Mods
from tests.ptx.registers import WARP, Lanes
from tests.ptx.scalars import DTYPES, WIDTHS, Array, storage
from tests.ptx.syntax import Instruction, Not, Operand, Pair, Sink, Vector

BIT = np.uint32(1) << np.arange(WARP, dtype=np.uint32)


def _ballot(mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """[warps]: a bit for each thread."""
    return (mask.reshape(-1, WARP) * BIT).sum(1, dtype=np.uint32)


def require_members(members: NDArray[np.uint32], lanes: Lanes, what: str) -> None:
    """Each active thread is in the mask that it gives, and so are only active threads."""
    index = np.arange(lanes.mask.size)
    alone = members >> (index % WARP).astype(np.uint32) & np.uint32(1) == 0
    lane = lanes.first(alone)
    if lane is not None:
        raise FaultError(f"{what} by a thread that is not in its own member mask", lane)
    missing = members & ~np.repeat(_ballot(lanes.mask), WARP)
    lane = lanes.first(missing != 0)
    if lane is not None:
        absent = int(missing[lane])
        raise FaultError(f"{what} with inactive lanes {[i for i in range(WARP) if absent >> i & 1]} in its mask", lane)


def bind_mma(block: Block, instruction: Instruction) -> Execute:
    its = product(instruction.mods)
    groups: list[list[Operand]] = []
    for operand, count in zip(instruction.operands, its.registers, strict=True):
        items = list(operand.items) if isinstance(operand, Vector) else [operand]
        if len(items) != count:
            raise FaultError(f"a fragment of {len(items)} registers instead of {count}")
        groups.append(items)
    targets = [block.register(item) for item in groups[0]]
    sources = [[block.source(item, "b32") for item in group] for group in groups[1:]]
    registers = [r for group in sources for _, r in group if r is not None]

    def execute(lanes: Lanes) -> None:
        lanes.require_whole_warps("mma")
        require(registers, lanes)
        chosen = slice(None) if lanes.full else lanes.index
        result = its.compute(*(np.stack([bits[chosen] for bits, _ in group], 1) for group in sources))
        for register, column in zip(targets, result.T, strict=True):
            block.put(register, column, lanes)

    return execute


def bind_shfl(block: Block, instruction: Instruction) -> Execute:
    m = Mods("shfl", instruction.mods)
    m.one_of("sync")
    mode = m.one_of("up", "down", "bfly", "idx")
    m.kind("b32")
    m.done()
    target, *operands = instruction.operands
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    register = block.register(first)
    valid = None if isinstance(second, Sink) else block.register(second)
    (values, _), *others = sources = [
        block.source(operand, kind) for operand, kind in zip(operands, ("b32",) * 4, strict=True)
    ]
    registers = [r for _, r in sources if r is not None]
    lane = (block.index % WARP).astype(np.int64)
    warp = block.index - lane

    def execute(lanes: Lanes) -> None:
        require(registers, lanes)
        amount, clamp, members = (bits for bits, _ in others)
        require_members(members, lanes, "shfl.sync")
        by, limit, segment = (x.astype(np.int64) for x in (amount & 31, clamp & 31, clamp >> 8 & 31))
        last, first_of = (lane & segment) | (limit & ~segment), lane & segment
        from_ = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first_of | (by & ~segment)}[mode]
        inside = from_ >= last if mode == "up" else from_ <= last
        from_ = np.where(inside, from_, lane)
        stray = lanes.first(members >> from_.astype(np.uint32) & np.uint32(1) == 0)
        if stray is not None:
            raise FaultError(f"shfl.sync from lane {int(from_[stray])}, which does not take part", stray)
        register.write(values[warp + from_], lanes)
        if valid is not None:
            valid.write(inside, lanes)

    return execute


def bind_vote(block: Block, instruction: Instruction) -> Execute:
    m = Mods("vote", instruction.mods)
    m.one_of("sync")
    mode = m.one_of("all", "any", "uni", "ballot")
    m.kind("b32" if mode == "ballot" else "pred")
    m.done()
    target, operand, mask = instruction.operands
    inverts = isinstance(operand, Not)
    predicate, origin = block.source(operand.reg if isinstance(operand, Not) else operand, "pred")
    members, mask_origin = block.source(mask, "b32")
    register = block.register(target)

    def execute(lanes: Lanes) -> None:
        require([r for r in (origin, mask_origin) if r is not None], lanes)
        require_members(members, lanes, "vote.sync")
        ballot = np.repeat(_ballot((predicate ^ inverts) & lanes.mask), WARP) & members
        if mode == "ballot":
            register.write(ballot, lanes)
        else:
            every, some = ballot == members, ballot != 0
            register.write({"all": every, "any": some, "uni": every | ~some}[mode], lanes)

    return execute


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def bind_redux(block: Block, instruction: Instruction) -> Execute:
    m = Mods("redux", instruction.mods)
    m.one_of("sync")
    reduce, kind = REDUCTIONS[m.one_of(*REDUCTIONS)], m.kind("u32", "s32", "b32")
    m.done()
    target, operand, mask = instruction.operands
    values, origin = block.source(operand, kind)
    members, mask_origin = block.source(mask, "b32")
    register = block.register(target)

    def execute(lanes: Lanes) -> None:
        require([r for r in (origin, mask_origin) if r is not None], lanes)
        require_members(members, lanes, "redux.sync")
        result = register.bits.copy()
        for warp in lanes.warps:
            its = lanes.index[lanes.index // WARP == warp]
            for group in np.unique(members[its]):
                inside = its[members[its] == group]
                result[inside] = reduce.reduce(values[inside], dtype=values.dtype).view(np.uint32)  # type: ignore[attr-defined]
        register.write(result, lanes)

    return execute


def bind_activemask(block: Block, instruction: Instruction) -> Execute:
    register = block.register(instruction.operands[0])
    return lambda lanes: register.write(np.repeat(_ballot(lanes.mask), WARP), lanes)


def bind_warp_barrier(block: Block, instruction: Instruction) -> Execute:
    members, origin = block.source(instruction.operands[0], "b32")

    def execute(lanes: Lanes) -> None:
        require([origin] if origin is not None else [], lanes)
        require_members(members, lanes, "bar.warp.sync")
        block.shared.warp_barrier(lanes.warps)

    return execute


def _wrapped(old: Any, limit: Any, up: bool) -> Any:
    if up:
        return old.dtype.type(0) if old >= limit else old + 1
    return limit if old == 0 or old > limit else old - 1


ATOMICS: dict[str, Callable[..., Any]] = {
    **REDUCTIONS,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: _wrapped(old, limit, True),
    "dec": lambda old, limit: _wrapped(old, limit, False),
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}


def bind_atomic(block: Block, instruction: Instruction, count: LineCount) -> Execute:
    """atom and red: the threads one after the other, by their index."""
    returns = instruction.name == "atom"
    m = Mods(instruction.name, instruction.mods)
    space = take_space(m)
    name = m.one_of(*ATOMICS)
    m.flag("noftz")
    kind = m.kind("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "f16x2", "f16")
    m.done()
    operands = list(instruction.operands)
    register = block.register(operands.pop(0)) if returns and not isinstance(operands[0], Sink) else None
    operands = operands[1:] if returns and register is None else operands
    address = Address(block, operands.pop(0))
    sources = [block.source(operand, kind) for operand in operands]
    registers = [*address.registers, *(r for _, r in sources if r is not None)]
    accessor, width, dtype = Accessor(block, space, count), WIDTHS[kind], DTYPES[kind]

    def change(memory: Array, rows: NDArray[np.int64], lanes: NDArray[np.intp], old: Array) -> None:
        cells = memory.view(dtype).reshape(-1, width // dtype.itemsize)
        values = [bits.reshape(-1, width // dtype.itemsize) for bits, _ in sources]
        for position, (row, lane) in enumerate(zip(rows, lanes, strict=True)):
            old[position] = cells[row]
            cells[row] = ATOMICS[name](cells[row], *(each[lane] for each in values))

    def execute(lanes: Lanes) -> None:
        require(registers, lanes)
        at = address.of(lanes.index)
        before = np.zeros((lanes.index.size, width // dtype.itemsize), dtype)
        for its, mask, base in accessor.spaces(at, lanes.index):
            chosen = np.ones(at.size, np.bool_) if mask is None else mask
            where, who, old = at[chosen] - base, lanes.index[chosen], before[chosen]
            if its == "shared":
                change(block.shared.bytes, block.shared.atomic(where, width, who), who, old)
                accessor.note_wavefronts(where, width, who)
            else:
                rows = block.memory.locate(where, width, who, its, writes=True)
                change(block.memory.bytes, rows, who, old)
                accessor.note_sectors(its, where, width, who)
            before[chosen] = old
        if register is not None:
            block.put(register, before.view(storage(kind)).ravel(), lanes)

    return execute
