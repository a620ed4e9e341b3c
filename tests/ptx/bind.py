"""Instructions that each thread executes by itself: plans, mov and cvta, bound to the registers of a block."""

from __future__ import annotations

import numpy as np

from tests.ptx.block import Block, Execute
from tests.ptx.errors import FaultError
from tests.ptx.integer import require_divisors
from tests.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW
from tests.ptx.plans import FLOATS, Mods, Plan
from tests.ptx.registers import Lanes, Register
from tests.ptx.scalars import DTYPES, UNSIGNED, WIDTHS, Array, narrow, storage, widen
from tests.ptx.syntax import Imm, Instruction, Not, Operand, Pair, Sink, Symbol, Vector


def require(registers: list[Register], lanes: Lanes) -> None:
    for register in registers:
        if not register.known:
            register.require(lanes)


def bind_plan(block: Block, instruction: Instruction, plan: Plan) -> Execute:
    """Computes for all threads and writes for the active ones."""
    target, *operands = instruction.operands
    if len(operands) != len(plan.sources):
        raise FaultError(f"{len(operands)} sources instead of {len(plan.sources)}")
    converts = instruction.name == "cvt"
    targets = _targets(block, target, plan, converts)
    sources: list[Array] = []
    registers: list[Register] = []
    inverted: list[int] = []
    narrowed: list[int] = []
    for position, (operand, kind) in enumerate(zip(operands, plan.sources, strict=True)):
        if isinstance(operand, Not):
            inverted.append(position)
            operand = operand.reg
        values, register = block.bits(operand, WIDTHS[kind]) if converts else block.source(operand, kind)
        if converts:
            if values.itemsize < WIDTHS[kind]:
                raise FaultError(f"{operand} is not as wide as {kind}")
            if values.itemsize > WIDTHS[kind]:
                narrowed.append(position)
            else:
                values = values.view(DTYPES[kind])
        sources.append(values)
        if register is not None and register not in registers:
            registers.append(register)
    divides = instruction.name in ("div", "rem") and plan.sources[0] not in FLOATS

    def execute(lanes: Lanes) -> None:
        for register in registers:
            if not register.known:
                register.require(lanes)
        values = sources
        if inverted or narrowed:
            values = list(sources)
            for position in inverted:
                values[position] = ~values[position]
            for position in narrowed:
                values[position] = narrow(values[position], plan.sources[position])
        if divides:
            require_divisors(values[1], lanes.mask)
        results = plan.compute(*values)
        for (register, kind), result in zip(targets, results if len(plan.results) > 1 else (results,), strict=False):
            if register is not None:
                register.write(widen(result, kind, register.bits.dtype) if kind != "pred" else result, lanes)

    return execute


def _targets(block: Block, target: Operand, plan: Plan, converts: bool) -> list[tuple[Register | None, str]]:
    names = (target.first, target.second) if isinstance(target, Pair) else (target,)
    targets: list[tuple[Register | None, str]] = []
    for name, kind in zip(names, plan.results, strict=False):
        register = None if isinstance(name, Sink) else block.register(name)
        if register is not None:
            has, wants = register.bits.dtype, storage(kind)
            if has != wants and not (converts and has.itemsize > wants.itemsize):
                raise FaultError(f"{register.name} is not as wide as {kind}")
        targets.append((register, kind))
    return targets


def bind_mov(block: Block, instruction: Instruction) -> Execute:
    """Copies, packs and unpacks. What was not written may be copied: the copy counts as not written, too."""
    m = Mods("mov", instruction.mods)
    kind = m.kind()
    m.done()
    target, source = instruction.operands
    if isinstance(target, Vector):
        return _unpack(block, target, source, kind)
    if isinstance(source, Vector):
        return _pack(block, target, source, kind)
    values, origin = block.source(source, kind)
    register = block.register(target)
    bits = values.view(storage(kind))
    if register.bits.dtype != bits.dtype:
        raise FaultError(f"{register.name} is not as wide as {kind}")

    def execute(lanes: Lanes) -> None:
        register.write(bits, lanes)
        if origin is not None and not origin.known:
            register.unwrite(~origin.written, lanes)

    return execute


def _unpack(block: Block, target: Vector, source: Operand, kind: str) -> Execute:
    part = UNSIGNED[WIDTHS[kind] // len(target.items)]
    values, origin = block.source(source, kind)
    parts = values.view(part).reshape(block.threads, -1)
    registers = [None if isinstance(item, Sink) else block.register(item) for item in target.items]
    if any(r is not None and r.bits.dtype != part for r in registers):
        raise FaultError(f"the parts of {kind} are not {part}")

    def execute(lanes: Lanes) -> None:
        require([origin] if origin is not None else [], lanes)
        for register, column in zip(registers, parts.copy().T, strict=True):
            if register is not None:
                register.write(column, lanes)

    return execute


def _pack(block: Block, target: Operand, source: Vector, kind: str) -> Execute:
    width = WIDTHS[kind] // len(source.items)
    register = block.register(target)
    pairs = [block.bits(item, width) for item in source.items]
    if any(values.itemsize != width for values, _ in pairs) or register.bits.dtype != storage(kind):
        raise FaultError(f"the parts of {kind} are not {width} bytes wide")
    origins = [origin for _, origin in pairs if origin is not None]

    def execute(lanes: Lanes) -> None:
        require(origins, lanes)
        register.write(np.stack([values for values, _ in pairs], 1).view(register.bits.dtype)[:, 0], lanes)

    return execute


def bind_cvta(block: Block, instruction: Instruction) -> Execute:
    """Between addresses of a state space and generic ones."""
    m = Mods("cvta", instruction.mods)
    back = m.flag("to")
    space, kind = m.one_of("global", "shared", "local", "const", "param", "shared::cta"), m.kind("u64")
    m.done()
    window = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    target, source = instruction.operands
    if isinstance(source, Imm | Symbol) and back:
        raise FaultError("not an address in a register")
    values, origin = block.source(source, kind)
    register, difference = block.register(target), np.uint64(window)

    def execute(lanes: Lanes) -> None:
        require([origin] if origin is not None else [], lanes)
        register.write(values - difference if back else values + difference, lanes)

    return execute
