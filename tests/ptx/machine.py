"""Runs the threads of a block: of those that can go on, always the ones at the lowest position.

Threads at one position run as one, of whichever warps. As warps only meet at barriers, each is by itself a warp whose
diverged threads run lowest position first, which is what brings them together again (see `flow`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx import access, bind, compare, convert, floating, integer, warp  # noqa: F401  (they register plans)
from tests.ptx.block import Block, Execute
from tests.ptx.counters import LineCount
from tests.ptx.errors import FaultError, PtxError
from tests.ptx.flow import ENDS, Step
from tests.ptx.plans import plan
from tests.ptx.registers import Lanes, Mask, Register
from tests.ptx.scalars import Array
from tests.ptx.syntax import Imm, Instruction

GOTO, BRANCH, END, BARRIER, PLAIN = range(5)
FENCES = ("membar", "fence")  # accesses are in order here
BINDERS: dict[str, Callable[[Block, Instruction], Execute]] = {
    "mov": bind.bind_mov, "cvta": bind.bind_cvta, "mma": warp.bind_mma, "shfl": warp.bind_shfl,
    "vote": warp.bind_vote, "redux": warp.bind_redux, "activemask": warp.bind_activemask,
}  # fmt: skip
COUNTED: dict[str, Callable[[Block, Instruction, LineCount], Execute]] = {
    "ld": access.bind_ld, "st": access.bind_st, "cp": access.bind_cp_async, "ldmatrix": access.bind_ldmatrix,
    "atom": warp.bind_atomic, "red": warp.bind_atomic,
}  # fmt: skip


@dataclass
class _Bound:
    """A step that is ready to run."""

    kind: int
    target: int
    instruction: Instruction | None
    count: LineCount
    guard: Register | None = None
    negated: bool = False
    execute: Execute | None = None


@dataclass
class _Waiting:
    """Threads at a barrier: where they were."""

    position: int
    mask: Mask


class Machine:
    """A kernel bound to the state of a block."""

    def __init__(self, block: Block, steps: list[Step], limit: int) -> None:
        self.block, self.limit = block, limit
        self._position = 0
        self._steps: list[_Bound] = []
        for step in steps:
            try:
                self._steps.append(self._bind(step))
            except FaultError as fault:
                raise self._error(fault, step.instruction) from None
            except ValueError:  # a number of operands that is not what the instruction takes
                raise self._error(FaultError("unknown instruction: its operands"), step.instruction) from None

    @property
    def counts(self) -> list[tuple[int, LineCount]]:
        return [(s.instruction.line, s.count) for s in self._steps if s.instruction is not None]

    def _bind(self, step: Step) -> _Bound:
        instruction = step.instruction
        if instruction is None:
            return _Bound(GOTO, step.target, None, LineCount("", ""))
        count = LineCount(instruction.opcode, instruction.text)
        bound = _Bound(PLAIN, step.target, instruction, count, negated=instruction.negated)
        if instruction.guard is not None:
            bound.guard = self.block.register(instruction.guard)
        name, block = instruction.name, self.block
        if name == "bra" and instruction.mods in ((), ("uni",)):
            bound.kind = BRANCH
        elif name in ENDS:
            bound.kind = END
        elif name in ("bar", "barrier") and instruction.mods[:1] != ("warp",):
            bound.kind, bound.execute = BARRIER, self._barrier(instruction)
        elif name == "bar" and instruction.mods == ("warp", "sync"):
            bound.execute = warp.bind_warp_barrier(block, instruction)
        elif name in FENCES or instruction.opcode.startswith("prefetch."):
            bound.execute = lambda lanes: None
        elif name == "trap":
            bound.execute = _trap
        elif name in BINDERS:
            bound.execute = BINDERS[name](block, instruction)
        elif name in COUNTED:
            bound.execute = COUNTED[name](block, instruction, count)
        else:
            its = plan(name, instruction.mods)
            if its is None:
                raise FaultError(f"unknown instruction {instruction.opcode}")
            bound.execute = bind.bind_plan(block, instruction, its)
        return bound

    def _barrier(self, instruction: Instruction) -> Execute:
        """What a barrier does when all are there: nothing, or the result of bar.red."""
        mods = tuple(mod for mod in instruction.mods if mod not in ("cta", "aligned"))
        operands = list(instruction.operands)
        if not isinstance(operands[0], Imm) and mods[0] == "sync":
            raise FaultError("the barrier is not a constant")
        if mods == ("sync",) and len(operands) == 1:
            return lambda lanes: None
        if mods == ("sync",) and isinstance(operands[1], Imm) and operands[1].value == self.block.threads:
            return lambda lanes: None
        reductions = {("red", "or", "pred"), ("red", "and", "pred"), ("red", "popc", "u32")}
        if mods not in reductions or len(operands) != 3:
            raise FaultError(f"unknown instruction {instruction.opcode} with {len(operands)} operands")
        values, origin = self.block.source(operands[2], "pred")
        register = self.block.register(operands[0])

        def execute(lanes: Lanes) -> None:
            bind.require([origin] if origin is not None else [], lanes)
            its = values[lanes.mask]
            result: Array = np.asarray({"or": its.any(), "and": its.all(), "popc": np.uint32(its.sum())}[mods[1]])
            register.write(result, lanes)

        return execute

    def _error(self, fault: FaultError, instruction: Instruction | None) -> PtxError:
        thread = self.block.name(fault.lane) if fault.lane is not None else ""
        line, text = (instruction.line, instruction.text) if instruction is not None else (0, "")
        return PtxError(fault.message, self.block.kernel.name, line, text, thread)

    def run(self) -> None:
        """Runs the block from its first instruction until all its threads have ended."""
        self._pending: dict[int, Mask] = {0: self.block.live.copy()}
        self._waiting: list[_Waiting] = []
        self._left = self.limit
        try:
            while self._pending or self._waiting:
                if not self._pending:
                    self._release()
                position = min(self._pending)
                mask = self._pending.pop(position)
                self._advance(position, mask, min(self._pending, default=len(self._steps)))
        except FaultError as fault:
            raise self._error(fault, self._steps[self._position].instruction) from None

    def _push(self, position: int, mask: Mask) -> None:
        if position in self._pending:
            mask = mask | self._pending[position]
        self._pending[position] = mask

    def _advance(self, position: int, mask: Mask, stop: int) -> None:
        """Runs these threads until they diverge, end, wait, or come to where others are."""
        lanes = Lanes(mask, self.block.live)
        warps = lanes.warps.size
        steps = self._steps
        while position < stop:
            self._position = position
            step = steps[position]
            step.count.executed += warps
            self._left -= 1
            if self._left < 0:
                raise FaultError(f"does not end within {self.limit} steps", int(lanes.index[0]))
            if step.kind == GOTO:
                position = step.target
                continue
            active = lanes
            if step.guard is not None:
                if not step.guard.known:
                    step.guard.require(lanes)
                active = lanes.where(~step.guard.bits if step.negated else step.guard.bits)
            if step.kind == PLAIN:
                if step.guard is None or active.mask.any():
                    step.execute(active)  # type: ignore[misc]
                position += 1
                continue
            if step.guard is not None and not active.mask.any():
                position += 1
                continue
            rest = lanes.mask & ~active.mask
            if step.kind == BRANCH:
                if not rest.any():
                    position = step.target
                    continue
                self._push(step.target, active.mask)
            elif step.kind == END:
                self.block.live = self.block.live & ~active.mask
            else:
                self._arrive(position, active)
            if rest.any():
                self._push(position + 1, rest)
            return
        self._push(position, lanes.mask)

    def _arrive(self, position: int, lanes: Lanes) -> None:
        absent = lanes.stragglers[self.block.live[lanes.stragglers]]
        if absent.size:
            raise FaultError("a barrier in divergent code: this thread of the warp is elsewhere", int(absent[0]))
        self._waiting.append(_Waiting(position, lanes.mask))

    def _identity(self, waiting: _Waiting) -> tuple[str, int]:
        """Which barrier it is, and of bar.red also where."""
        instruction = self._steps[waiting.position].instruction
        assert instruction is not None
        reduces = "red" in instruction.mods
        barrier = instruction.operands[1 if reduces else 0]
        return str(barrier), waiting.position if reduces else -1

    def _release(self) -> None:
        """Nobody can go on: the barrier at which all threads are lets them go, or there is none."""
        first = self._waiting[0]
        same = [each for each in self._waiting if self._identity(each) == self._identity(first)]
        arrived = np.logical_or.reduce([each.mask for each in same])
        self._position = first.position
        missing = np.flatnonzero(self.block.live & ~arrived)
        if missing.size:
            thread = int(missing[0])
            where = next(each.position for each in self._waiting if each.mask[thread])
            its = self._steps[where].instruction
            assert its is not None
            raise FaultError(f"deadlock: this thread waits at line {its.line} `{its.text}` instead", thread)
        self._waiting = []
        for each in same:
            self._steps[each.position].execute(Lanes(arrived, self.block.live))  # type: ignore[misc]
            self._push(each.position + 1, each.mask)
        self.block.shared.barrier()


def _trap(lanes: Lanes) -> None:
    raise FaultError("trap", int(lanes.index[0]))
