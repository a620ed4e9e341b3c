"""Shared memory of one block, and what its threads may not do with it.

Each byte has a state (never written, being copied by a cp.async, copied but not yet behind a barrier, ready) and the
warps that wrote and read it since the last barrier. What threads of one warp do to each other is not checked, except
for cp.async, whose bytes only the thread that waited for them may read before a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import FaultError
from tests.ptx.memory import Addresses, Bytes, Index, require_aligned
from tests.ptx.registers import WARP
from tests.ptx.syntax import Variable

START = 1024  # the address of the first byte: 0 is nothing
GAP = 128  # bytes between variables, which nobody may touch
NEVER, READY, PENDING, ARRIVED, OF_WARP = range(5)
MANY, ATOMIC = 254, 255  # in place of a warp (counted from 1)


@dataclass
class _Copy:
    """The cp.async of some threads that are not complete: each copies a row into shared memory."""

    lanes: Index
    groups: NDArray[np.int64]
    rows: Addresses
    width: int


class SharedMemory:
    def __init__(self, variables: Sequence[Variable], dynamic: int, threads: int) -> None:
        self.addresses: dict[str, int] = {}
        inside: list[tuple[int, int]] = []
        end = START
        for variable in sorted(variables, key=lambda v: v.extern):
            end += -end % max(variable.align, 16)
            self.addresses[variable.name] = end
            size = dynamic if variable.extern else variable.size
            inside.append((end, end + size))
            if not variable.extern:
                end += size + GAP
        end = max((stop for _, stop in inside), default=START)
        self.size = -(-(end - START) // 16) * 16
        self._inside = np.zeros(self.size + 1, np.bool_)
        for start, stop in inside:
            self._inside[start - START : stop - START] = True
        self.bytes: Bytes = np.zeros(self.size, np.uint8)
        self._state = np.zeros(self.size, np.uint8)
        self._writer = np.zeros(self.size, np.uint8)
        self._reader = np.zeros(self.size, np.uint8)
        self._owner = np.zeros(self.size, np.int16)  # the thread whose cp.async wrote it last
        self._open = np.zeros(threads, np.int64)  # groups committed, so the number of the group that is open
        self._complete = np.zeros(threads, np.int64)  # groups that are complete
        self._copies: list[_Copy] = []
        self._any_arrived = False
        self._several = threads > WARP

    # -- accesses ----------------------------------------------------------------------------------------------

    def load(self, address: Addresses, width: int, lanes: Index, for_others: bool = False) -> Bytes:
        """[lanes, width]: the bytes at these addresses, which must be ready for these threads (or for their warp)."""
        rows = self._rows(address, width, lanes, "reads")
        state = self._state.reshape(-1, width)[rows]
        if (state != READY).any():
            self._require_ready(state, rows, lanes, for_others)
        if self._several:
            self._note_readers(rows, width, lanes)
        return self.bytes.reshape(-1, width)[rows]

    def store(self, address: Addresses, values: Bytes, lanes: Index) -> None:
        width = values.shape[1]
        rows = self._rows(address, width, lanes, "writes")
        self._claim(rows, width, lanes)
        self._state.reshape(-1, width)[rows] = READY
        self.bytes.reshape(-1, width)[rows] = values

    def atomic(self, address: Addresses, width: int, lanes: Index) -> Addresses:
        """Rows of `bytes` that these threads change one after the other."""
        rows = self._rows(address, width, lanes, "updates")
        state = self._state.reshape(-1, width)[rows]
        if (state != READY).any():
            self._require_ready(state, rows, lanes, for_others=True)
        warp = ((lanes // WARP) + 1).astype(np.uint8)[:, None]
        for other, allowed in ((self._writer, ATOMIC), (self._reader, 0)):
            found = other.reshape(-1, width)[rows]
            self._require_own(found, (found == 0) | (found == warp) | (found == allowed), rows, lanes, "updates")
        self._writer.reshape(-1, width)[rows] = ATOMIC
        return rows

    def copy(self, address: Addresses, values: Bytes, lanes: Index) -> None:
        """A cp.async: the bytes are there, but nobody may touch them until their group is complete."""
        width = values.shape[1]
        rows = self._rows(address, width, lanes, "copies")
        self._claim(rows, width, lanes)
        self._state.reshape(-1, width)[rows] = PENDING
        owner = self._owner.reshape(-1, width)
        owner[rows] = lanes[:, None]
        twice = owner[rows] != lanes[:, None]
        if twice.any():
            access, byte = self._where(twice, rows)
            raise FaultError(f"race: two threads copy to shared memory at {self.name(byte)}", int(lanes[access]))
        self.bytes.reshape(-1, width)[rows] = values
        self._copies.append(_Copy(lanes, self._open[lanes], rows, width))

    # -- order -------------------------------------------------------------------------------------------------

    def commit(self, lanes: Index) -> None:
        self._open[lanes] += 1

    def wait(self, lanes: Index, allowed: int) -> None:
        """All but the last `allowed` groups of these threads are complete."""
        self._complete[lanes] = np.maximum(self._complete[lanes], self._open[lanes] - allowed)
        pending: list[_Copy] = []
        for copy in self._copies:
            done = copy.groups < self._complete[copy.lanes]
            if done.any():
                self._any_arrived = True
                self._state.reshape(-1, copy.width)[copy.rows[done]] = ARRIVED
                left = ~done
                copy = _Copy(copy.lanes[left], copy.groups[left], copy.rows[left], copy.width)
            if copy.lanes.size:
                pending.append(copy)
        self._copies = pending

    def warp_barrier(self, warps: Index) -> None:
        """What has arrived at threads of these warps is there for their whole warp."""
        if self._any_arrived:
            arrived = np.flatnonzero(self._state == ARRIVED)
            self._state[arrived[np.isin(self._owner[arrived] // WARP, warps)]] = OF_WARP

    def barrier(self) -> None:
        """All threads of the block have met: what has arrived is there for all, and nothing can race with before."""
        if self._any_arrived:
            self._state[(self._state == ARRIVED) | (self._state == OF_WARP)] = READY
            self._any_arrived = False
        self._writer.fill(0)
        self._reader.fill(0)

    # -- checks ------------------------------------------------------------------------------------------------

    def _rows(self, address: Addresses, width: int, lanes: Index, what: str) -> Addresses:
        require_aligned(address, width, lanes)
        first = address - START
        within = (first >= 0) & (first + width <= self.size)
        safe = np.where(within, first, 0)
        inside = within & self._inside[safe] & self._inside[np.minimum(safe + width - 1, self.size)]
        if not inside.all():
            at = int(np.flatnonzero(~inside)[0])
            raise FaultError(f"{what} {width} bytes at {self.name(int(first[at]))}, out of bounds", int(lanes[at]))
        return first // width

    def name(self, offset: int) -> str:
        """A byte by the variable that it belongs to or follows."""
        below = [(a, n) for n, a in self.addresses.items() if a <= offset + START] or [(START, "shared memory")]
        address, name = max(below)
        return f"{name}+{offset + START - address}"

    def _where(self, wrong: NDArray[np.bool_], rows: Addresses) -> tuple[int, int]:
        """Which access, and which byte of shared memory, is the first wrong one of [accesses, width]."""
        access, byte = np.argwhere(wrong)[0]
        return int(access), int(rows[access]) * wrong.shape[1] + int(byte)

    def _require_ready(self, state: Bytes, rows: Addresses, lanes: Index, for_others: bool) -> None:
        owner = self._owner.reshape(-1, state.shape[1])[rows]
        mine = (state == OF_WARP) & (owner // WARP == lanes[:, None] // WARP)
        if not for_others:
            mine |= (state == ARRIVED) & (owner == lanes[:, None])
        wrong = (state != READY) & ~mine
        if not wrong.any():
            return
        access, byte = self._where(wrong, rows)
        by = f"that thread {int(self._owner[byte])} copies by cp.async"
        why = {
            NEVER: "which is uninitialised",
            PENDING: f"{by} in a group that it has not waited for",
            ARRIVED: f"{by} and has waited for, but there was no barrier since",
            OF_WARP: f"{by} and has waited for, but there was no barrier since except of its warp",
        }[int(self._state[byte])]
        raise FaultError(f"reads shared memory at {self.name(byte)}, {why}", int(lanes[access]))

    def _require_own(self, found: Bytes, fine: NDArray[np.bool_], rows: Addresses, lanes: Index, what: str) -> None:
        """Since the last barrier no other warp was there."""
        if fine.all():
            return
        access, byte = self._where(~fine, rows)
        width = found.shape[1]
        other = int(found[access, byte % width])
        who = {MANY: "several warps", ATOMIC: "an atomic"}.get(other, f"warp {other - 1}")
        raise FaultError(
            f"race: {what} shared memory at {self.name(byte)}, touched by {who} since the last barrier",
            int(lanes[access]),
        )

    def _note_readers(self, rows: Addresses, width: int, lanes: Index) -> None:
        warp = ((lanes // WARP) + 1).astype(np.uint8)[:, None]
        written = self._writer.reshape(-1, width)[rows]
        if written.any():
            self._require_own(written, (written == 0) | (written == warp), rows, lanes, "reads")
        readers = self._reader.reshape(-1, width)
        before = readers[rows]
        after = np.where((before == 0) | (before == warp), warp, np.uint8(MANY))
        readers[rows] = after
        lost = readers[rows] != after  # two warps at once: one of them has overwritten the other
        if lost.any():
            self._reader[(rows[:, None] * width + np.arange(width))[lost]] = MANY

    def _claim(self, rows: Addresses, width: int, lanes: Index) -> None:
        """Notes these threads as writers, if nothing is in the way."""
        state = self._state.reshape(-1, width)[rows]
        if (state > READY).any():
            other = self._owner.reshape(-1, width)[rows] != lanes[:, None]
            wrong = (state == PENDING) | ((state > READY) & other)
            if wrong.any():
                access, byte = self._where(wrong, rows)
                raise FaultError(
                    f"race: writes shared memory at {self.name(byte)} that a cp.async of thread "
                    f"{int(self._owner[byte])} writes",
                    int(lanes[access]),
                )
        if not self._several:
            return
        warp = ((lanes // WARP) + 1).astype(np.uint8)[:, None]
        for other in (self._writer, self._reader):
            found = other.reshape(-1, width)[rows]
            if found.any():
                self._require_own(found, (found == 0) | (found == warp), rows, lanes, "writes")
        writers = self._writer.reshape(-1, width)
        writers[rows] = warp
        after = writers[rows]
        if (after != warp).any():
            self._require_own(after, after == warp, rows, lanes, "writes")
