"""The threads of a block and what they hold: a register is one array with an entry for each thread."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import FaultError
from tests.ptx.scalars import DTYPES, Array, storage

WARP = 32
Mask = NDArray[np.bool_]


class Lanes:
    """The threads that execute an instruction; `live` are those of the block that have not ended."""

    def __init__(self, mask: Mask, live: Mask) -> None:
        self.mask, self.live = mask, live
        self.full = bool(mask.all())

    @functools.cached_property
    def index(self) -> NDArray[np.intp]:
        """The active threads."""
        return np.flatnonzero(self.mask)

    @functools.cached_property
    def warps(self) -> NDArray[np.intp]:
        """The warps that have an active thread."""
        return np.flatnonzero(self.mask.reshape(-1, WARP).any(1))

    @functools.cached_property
    def stragglers(self) -> NDArray[np.intp]:
        """Threads that are not active, of warps that are."""
        by_warp = self.mask.reshape(-1, WARP)
        return np.flatnonzero(~by_warp & by_warp.any(1)[:, None])

    def where(self, predicate: Mask) -> Lanes:
        """Those of them for which it holds."""
        return Lanes(self.mask & predicate, self.live)

    def first(self, wrong: Mask) -> int | None:
        """One active thread for which it holds."""
        found = np.flatnonzero(wrong & self.mask)
        return int(found[0]) if found.size else None

    def require_whole_warps(self, what: str) -> None:
        """For instructions that all 32 threads of a warp execute together."""
        if self.stragglers.size:
            raise FaultError(f"{what} is executed without this thread of the warp", int(self.stragglers[0]))


class Register:
    """The bits of one register in each thread, and which threads have written it."""

    __slots__ = ("bits", "known", "name", "written")

    def __init__(self, name: str, kind: str, threads: int) -> None:
        self.name = name
        self.bits: Array = np.zeros(threads, storage(kind))
        self.known = False  # in all threads
        self.written: Mask = np.zeros(threads, np.bool_)

    def forget(self) -> None:
        self.known = False
        self.written[:] = False

    def view(self, kind: str) -> Array:
        """The bits as values of a type of the same width; a pair as twice as many values."""
        return self.bits.view(DTYPES[kind])

    def require(self, lanes: Lanes) -> None:
        """Raises where an active thread has not written it."""
        if not self.known:
            lane = lanes.first(~self.written)
            if lane is not None:
                raise FaultError(f"reads {self.name}, which it has not written", lane)

    def write(self, bits: Array, lanes: Lanes) -> None:
        """Bits (of its storage type) for the active threads."""
        if lanes.full:
            self.bits[...] = bits
            self.known = True
            return
        np.copyto(self.bits, bits, where=lanes.mask)
        if not self.known:
            self.written |= lanes.mask
            self.known = bool(self.written.all())

    def unwrite(self, wrong: Mask, lanes: Lanes) -> None:
        """What active threads have just copied here is something that nobody has written."""
        if self.known:
            self.written[:] = True
        self.written &= ~(wrong & lanes.mask)
        self.known = bool(self.written.all())
