"""What a kernel costs, counted while it runs: instructions, wavefronts of shared memory, sectors of global memory.

The model of shared memory: 32 banks of 4 bytes; the 32 accesses of a warp are served in phases of 128 bytes (all 32
lanes for 4 bytes and less, halves for 8, quarters for 16; the 8 rows of each matrix for ldmatrix). A phase takes one
wavefront, and as many as there are different words in the fullest bank. Global memory comes in sectors of 32 bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.ptx.registers import WARP

BANKS_BYTES = 128
SECTOR = 32


@dataclass
class LineCount:
    """One instruction of the text: `executed` by warps, what its accesses need, and what they take."""

    opcode: str
    text: str
    executed: int = 0
    ideal_wavefronts: int = 0
    wavefronts: int = 0
    ideal_sectors: int = 0
    sectors: int = 0

    def __iadd__(self, other: LineCount) -> LineCount:
        self.executed += other.executed
        self.ideal_wavefronts += other.ideal_wavefronts
        self.wavefronts += other.wavefronts
        self.ideal_sectors += other.ideal_sectors
        self.sectors += other.sectors
        return self


@dataclass
class Counters:
    """Counts by line of the PTX text; instructions of one line are counted as one, with the opcode of the first."""

    lines: dict[int, LineCount] = field(default_factory=dict)
    instructions: collections.Counter[str] = field(default_factory=collections.Counter)  # by opcode, per warp
    mma: collections.Counter[str] = field(default_factory=collections.Counter)  # by shape and types, per warp

    def note(self, line: int, count: LineCount) -> None:
        """Adds what one instruction did."""
        if count.executed:
            self.instructions[count.opcode] += count.executed
            if count.opcode.startswith("mma."):
                shape = ".".join(p for p in count.opcode.split(".")[1:] if p not in ("sync", "aligned", "row", "col"))
                self.mma[shape] += count.executed
        if line in self.lines:
            self.lines[line] += count
        else:
            self.lines[line] = count

    @property
    def executed(self) -> set[int]:
        """The lines that some warp has executed."""
        return {line for line, count in self.lines.items() if count.executed}

    def _sum(self, what: str, lines: Collection[int] | None) -> int:
        return sum(getattr(c, what) for line, c in self.lines.items() if lines is None or line in lines)

    def wavefronts(self, lines: Collection[int] | None = None) -> tuple[int, int]:
        """Ideal and real wavefronts of shared memory, of these lines or all."""
        return self._sum("ideal_wavefronts", lines), self._sum("wavefronts", lines)

    def conflicts(self, lines: Collection[int] | None = None) -> int:
        """Wavefronts that bank conflicts cost, in these lines or all."""
        ideal, real = self.wavefronts(lines)
        return real - ideal

    def sectors(self, lines: Collection[int] | None = None) -> tuple[int, int]:
        """Ideal and real sectors of global memory, of these lines or all."""
        return self._sum("ideal_sectors", lines), self._sum("sectors", lines)


def _distinct(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    ordered = np.sort(keys)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))]


def count_wavefronts(address: NDArray[np.int64], width: int, lanes: NDArray[np.intp]) -> tuple[int, int]:
    """Ideal and real wavefronts of accesses by these threads."""
    width = max(width, 4)
    slots = BANKS_BYTES // width
    phase, unit = lanes // slots, address // width
    distinct = _distinct((phase << 32) | unit)
    per_slot = np.bincount((distinct >> 32) * slots + distinct % slots, minlength=slots)
    fullest = np.pad(per_slot, (0, -per_slot.size % slots)).reshape(-1, slots).max(1)
    return int((fullest > 0).sum()), int(fullest.sum())


def count_sectors(address: NDArray[np.int64], width: int, lanes: NDArray[np.intp]) -> tuple[int, int]:
    """Ideal and real sectors of accesses by these threads: ideal if the bytes that a warp wants lay side by side."""
    warp = (lanes // WARP).astype(np.int64) << 56
    wanted = np.bincount(_distinct(warp | address // width) >> 56) * width
    return int((-(-wanted // SECTOR)).sum()), int(_distinct(warp | address // SECTOR).size)
