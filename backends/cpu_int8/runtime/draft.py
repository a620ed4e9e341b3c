"""What a recording consists of: its lines, where values lie in memory, and how structs name parameters."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tfqc.backends.cpu_int8.runtime import abi
from tfqc.backends.cpu_int8.runtime.abi import Act, DType
from tfqc.backends.cpu_int8.runtime.fitting import check_quantizer, check_row, check_values, need
from tfqc.backends.cpu_int8.runtime.tiles import Tiles

DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.uint8: DType.U8}
_OUT = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8}


@dataclass(frozen=True)
class TableRows:
    """Parameters of which each step takes a row: [T, C], or with `request` [T, B, ...], a row for each image."""

    tensor: Tensor
    request: bool = False


@dataclass
class Line:
    """One line of a recording: a kernel and its struct, or a call of torch."""

    name: str
    kernel: str
    made: Tensor
    args: ctypes.Structure | None = None
    call: Callable[[], None] | None = None


@dataclass
class Draft:
    """A recording as it is written.

    memory: value -> (buffer, first, last), as plan-memory has it. arena: the memory of all buffers, at `offsets`; None
    to find out `sizes` and `spans` only, with tensors that have no memory. rows: of the schedule, with those that were
    added; kernels go to any of them. spare: how many rows there is room for, by the address of a table that has grown.
    capacity: how many rows every table has room for; with more, the step has to be recorded anew.
    """

    memory: Mapping[str, tuple[int, int, int]]
    arena: Tensor | None = None
    offsets: Mapping[int, int] = field(default_factory=dict[int, int])
    sizes: dict[int, int] = field(default_factory=dict[int, int])
    spans: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    lines: list[Line] = field(default_factory=list[Line])
    kept: list[Any] = field(default_factory=list[Any])
    reorders: list[str] = field(default_factory=list[str])
    scratch: int = 4 << 20  # bytes that each thread needs
    rows: int = 1
    spare: Mapping[int, int] = field(default_factory=dict[int, int])
    capacity: int = 1 << 62
    shared: int = 1 << 20  # bytes for what threads tell each other

    def _room(self, name: str, shape: Sequence[int], dtype: Any, order: Sequence[int] | None = None) -> Tensor:
        """Memory of a value; `order` lists its dimensions from the outermost in memory to the innermost."""
        dtype = _OUT[dtype] if isinstance(dtype, str) else dtype
        order = tuple(range(len(shape))) if order is None else tuple(order)
        within = [shape[d] for d in order]
        buffer, first, last = self.memory[name]
        size = math.prod(within) * dtype.itemsize
        if self.arena is None:
            self.sizes[buffer] = max(size, self.sizes.get(buffer, 0))
            before = self.spans.get(buffer, (first, last))
            self.spans[buffer] = (min(first, before[0]), max(last, before[1]))
            made = torch.empty(within, dtype=dtype)
        else:
            offset = self.offsets[buffer]
            made = self.arena[offset : offset + size].view(dtype).view(within)
        return made.permute([order.index(d) for d in range(len(shape))])

    def _ordered(self, name: str, x: Any, order: tuple[int, ...]) -> Any:
        """x, dense in memory in that order of its dimensions; copied at every step if it is not."""
        if x is None or x.permute(order).is_contiguous():
            return x
        self.reorders.append(name)
        back = [order.index(d) for d in range(x.dim())]
        made = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device=x.device).permute(back)
        return self._copied(f"{name} (reordered)", x, made)

    def _copied(self, name: str, x: Tensor, made: Tensor) -> Tensor:
        def copy() -> None:
            made.copy_(x)

        self.kept.append(made)
        self.lines.append(Line(name, "torch", made, call=copy))
        return made

    def _append(self, name: str, kernel: str, args: ctypes.Structure, made: Tensor) -> Tensor:
        self.kept.append(made)
        self.lines.append(Line(name, kernel, made, args))
        return made

    def _needs(self, patch: int) -> None:
        """Make room for the codes that a product copies at least: kernels take more where they find it.

        Pixels of 64 channels or more begin on cache lines, an odd number apart: that is up to three times as much.
        """
        self.scratch = max(self.scratch, 3 * patch + (2 << 20))

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None or self.arena is None:
            return None
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _weight(self, name: str, weight: Tiles, scale: Tensor) -> dict[str, Any]:
        if self.arena is None:
            return {}
        need(bool(scale.isfinite().all()), name, "a scale of the weight is not a number")
        scale, sums = weight.columns(scale), weight.sums
        return {"weight": self._at(weight.packed), "weight_scale": self._at(scale), "weight_sum": self._at(sums)}

    def _codes(self, name: str, x: Tensor, order: tuple[int, ...]) -> Tensor:
        need(x.dtype == torch.uint8 and x.numel() > 0, name, f"codes are {x.dtype}")
        return self._ordered(name, x, order)

    def _row(self, name: str, value: Any, width: int, batch: int) -> Any:
        """Rows of [C], [R, C] or rows of a table."""
        match value:
            case None:
                return abi.Rows()
            case TableRows(tensor, request):
                check_row(name, tensor, width, batch, self.rows, table=True, request=request)
                self._limit(tensor)
                return abi.Rows(
                    self._at(tensor), tensor.stride(0), tensor.stride(1) if request else 0, 0, _extent(tensor)
                )
            case _:
                check_row(name, value, width, batch, self.rows, table=False, request=False)
                each = value.dim() > 1 and value.shape[0] > 1
                return abi.Rows(self._at(value), 0, value.stride(0) if each else 0, 0, _extent(value))

    def _with_spare_rows(self, operand: Any) -> Any:
        """A table with the rows that it has room for, as later calls may read them."""
        if not isinstance(operand, Tensor) or operand.data_ptr() not in self.spare:
            return operand
        self._limit(operand)
        return operand.as_strided((self.spare[operand.data_ptr()], *operand.shape[1:]), operand.stride())

    def _limit(self, table: Tensor) -> None:
        if self.arena is not None:
            self.capacity = min(self.capacity, self.spare.get(table.data_ptr(), len(table)))

    def _quant(self, name: str, scale: Tensor | None, zero: Tensor | None, tokens: Sequence[int] = ()) -> Any:
        """Scales and zero points: [1], rows [T], or one for each of `tokens` [B, ...]."""
        if scale is None or zero is None:
            return abi.Quant()
        check_quantizer(name, scale, zero, tokens, self.rows)
        if self.arena is not None and scale.dim() == 1:
            need(bool((scale.isfinite() & (scale > 0)).all()), name, "a scale is not a positive number")
        if scale.dim() == 1 and len(scale) > 1:
            self._limit(scale)
            self._limit(zero)
        if scale.dim() > 1:
            entry = scale[0].numel()
            return abi.Quant(*(abi.Rows(self._at(t), 0, entry, 1, _extent(t)) for t in (scale, zero)))
        return abi.Quant(*(abi.Rows(self._at(t), int(t.shape[0] > 1), 0, 0, _extent(t)) for t in (scale, zero)))

    def _epilogue(
        self, name: str, made: Tensor, width: int, weight: Tiles, bias: Any, act: str, gate: Any,
        residual: Tensor | None, out_scale: Any, out_zero: Any,
    ) -> Any:  # fmt: skip
        check_values(name, residual)
        need(weight.paired == (act == "geglu"), name, f"the order of a weight's outputs is not that of {act}")
        need((out_scale is None) == (made.dtype != torch.uint8), name, "codes have no scale, or values have one")
        outputs, batch = weight.shape[0], made.shape[0]
        if isinstance(bias, Tensor) and weight.paired and self.arena is not None:
            bias = weight.columns(bias)
        return abi.Epilogue(
            bias=self._row(name, bias, outputs, batch), gate=self._row(name, gate, width, batch),
            residual=self._at(residual), out=self._at(made),
            residual_ld=width, out_ld=width, out_dtype=DTYPES[made.dtype], act=Act[act.upper()],
            residual_dtype=DTYPES[made.dtype if residual is None else residual.dtype],
            quant=self._quant(name, out_scale, out_zero),
        )  # fmt: skip


def _extent(tensor: Tensor) -> int:
    """How many numbers lie from a tensor's first to the end of its memory: tables have spare rows behind them."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() - int(tensor.storage_offset())


def like(residual: Tensor | None, made: Tensor) -> Tensor | None:
    """A residual for every entry: rows of the schedule may be one for the whole batch."""
    return None if residual is None else residual.expand(made.shape)


def natural(x: Tensor) -> tuple[int, ...]:
    return tuple(range(x.dim()))


def channels_last(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()), 1)


def order_of(x: Tensor) -> tuple[int, ...]:
    """Dimensions from the largest stride to the smallest, the batch first."""
    return (0, *sorted(range(1, x.dim()), key=lambda d: (-x.stride(d), d)))
