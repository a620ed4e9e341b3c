"""Packed weights as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tfqc.runtime import tiles
from tfqc.runtime.packing import unpack_int4


@dataclass
class Tiles:
    """Weight codes of `shape`, in tiles (`tfqc.runtime.tiles`), and their `sums`; `paired` for GEGLU."""

    packed: Tensor
    sums: Tensor
    shape: tuple[int, ...]
    groups: int = 1
    paired: bool = False
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])

    @classmethod
    def of(cls, stored: Tensor, sums: Tensor, shape: Sequence[int], groups: int, paired: bool, bits: int) -> Tiles:
        """From what is stored: tiles, or with 4 bits two codes of them a byte."""
        if bits == 4:
            stored = unpack_int4(stored, tiles.tiles_shape(shape, groups))
        return cls(stored, sums, tuple(shape), groups, paired)

    def columns(self, values: Tensor) -> Tensor:
        """Numbers for each column [..., N], in the order and with the padding of the tiles."""
        key = id(values)
        if key not in self._kept:
            self._kept[key] = (values, tiles.columns(values, self.groups, self.paired))
        return self._kept[key][1]

    @property
    def codes(self) -> Tensor:
        """The codes in their own shape."""
        return tiles.unpack(self.packed, self.shape, self.groups, self.paired, 8)
