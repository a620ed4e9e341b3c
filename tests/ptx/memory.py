"""Memory that is not shared by the threads of one block alone: global memory with guards, and each thread's own.

Addresses of one 64-bit space stand for all memory, as generic addresses do on a device: each buffer lies in a window
of its own, far from the others, so that whatever leaves its buffer hits nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import FaultError

LOCAL_WINDOW = 1 << 40
SHARED_WINDOW = 1 << 41
WINDOW = 1 << 24  # bytes of the two
GLOBAL_BASE = 1 << 44
SLOT = 36  # bits of the window of a buffer, which begins in the middle
MIDDLE = 1 << SLOT - 1

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]
Index = NDArray[np.intp]


def require_aligned(address: Addresses, width: int, lanes: Index) -> None:
    wrong = address % width != 0
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise FaultError(f"{width} bytes at misaligned address {int(address[at]):#x}", int(lanes[at]))


@dataclass(frozen=True)
class Buffer:
    """`size` bytes at `address`, which lie at `start` of the simulated memory."""

    name: str
    space: str  # global, const or param
    address: int
    start: int
    size: int
    writable: bool


class GlobalMemory:
    """Buffers, constants and parameters. Buffers are added first, then used."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._parts: list[tuple[int, Bytes]] = []
        self._end = 0

    def add(self, name: str, space: str, content: Bytes, writable: bool = True) -> int:
        """The address of a new buffer with that content."""
        address = GLOBAL_BASE + (len(self.buffers) << SLOT) + MIDDLE
        self.buffers.append(Buffer(name, space, address, self._end, content.size, writable))
        self._parts.append((self._end, content))
        self._end += -(-content.size // 256) * 256
        return address

    def freeze(self) -> None:
        self.bytes: Bytes = np.zeros(max(self._end, 256), np.uint8)
        for start, content in self._parts:
            self.bytes[start : start + content.size] = content
        self._starts = np.array([b.start for b in self.buffers], np.int64)
        self._sizes = np.array([b.size for b in self.buffers], np.int64)
        self._writable = np.array([b.writable for b in self.buffers], np.bool_)
        self._spaces = {
            s: np.array([b.space == s for b in self.buffers], np.bool_) for s in ("global", "const", "param")
        }
        self._spaces["generic"] = np.ones(len(self.buffers), np.bool_)

    def content(self, buffer: Buffer) -> Bytes:
        return self.bytes[buffer.start : buffer.start + buffer.size]

    def locate(self, address: Addresses, width: int, lanes: Index, space: str, writes: bool) -> Addresses:
        """Where in `bytes` these accesses lie, in units of their width; raises where one may not be made."""
        require_aligned(address, width, lanes)
        far = address - GLOBAL_BASE
        owner = far >> SLOT
        inside = (owner >= 0) & (owner < len(self.buffers))
        owner = np.where(inside, owner, 0)
        within = (far & ((1 << SLOT) - 1)) - MIDDLE
        inside &= (within >= 0) & (within + width <= self._sizes[owner]) & self._spaces[space][owner]
        if writes:
            inside &= self._writable[owner]
        if not inside.all():
            at = int(np.flatnonzero(~inside)[0])
            raise FaultError(self._explain(int(address[at]), width, space, writes), int(lanes[at]))
        return (self._starts[owner] + within) // width

    def _explain(self, address: int, width: int, space: str, writes: bool) -> str:
        what = f"{'writes' if writes else 'reads'} {width} bytes of {space} memory at {address:#x}"
        if not self.buffers or address < GLOBAL_BASE:
            return f"{what}, which is no buffer"
        near = self.buffers[min((address - GLOBAL_BASE) >> SLOT, len(self.buffers) - 1)]
        offset = address - near.address
        return (
            f"{what}: byte {offset} of {near.name}, "
            f"{'which is read-only, ' if not near.writable else ''}{near.size} bytes in {near.space} memory"
        )


class LocalMemory:
    """Bytes that each thread has for itself."""

    def __init__(self, size: int, threads: int) -> None:
        self.size, self._stride = size, -(-size // 16) * 16
        self.bytes: Bytes = np.zeros(self._stride * threads, np.uint8)
        self._written = np.zeros(self._stride * threads, np.bool_)

    def _rows(self, address: Addresses, width: int, lanes: Index) -> Addresses:
        require_aligned(address, width, lanes)
        inside = (address >= 0) & (address + width <= self.size)
        if not inside.all():
            at = int(np.flatnonzero(~inside)[0])
            raise FaultError(f"byte {int(address[at])} of local memory of {self.size} bytes", int(lanes[at]))
        return (address + lanes * self._stride) // width

    def load(self, address: Addresses, width: int, lanes: Index) -> Bytes:
        rows = self._rows(address, width, lanes)
        written = self._written.reshape(-1, width)[rows].all(1)
        if not written.all():
            at = int(np.flatnonzero(~written)[0])
            raise FaultError(f"reads byte {int(address[at])} of local memory, never written", int(lanes[at]))
        return self.bytes.reshape(-1, width)[rows]

    def store(self, address: Addresses, values: Bytes, lanes: Index) -> None:
        rows = self._rows(address, values.shape[1], lanes)
        self.bytes.reshape(-1, values.shape[1])[rows] = values
        self._written.reshape(-1, values.shape[1])[rows] = True
