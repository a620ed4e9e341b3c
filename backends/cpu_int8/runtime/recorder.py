"""From the lines of a model's `step` to a list of commands for kernels: written once for each shape of the inputs.

`Recorder` has a method for each kernel. It finds room for the result, fills the kernel's struct, and gives back a
tensor that lies where the result will lie. Views are taken of such tensors with torch; operations without a kernel
become calls of torch between the kernels. `Eager` has the same methods and computes at once, where no kernels can be
built.
"""

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
from tfqc.backends.cpu_int8.runtime.fitting import check_quantizer, check_row, check_values, check_weight, need
from tfqc.backends.cpu_int8.runtime.tiles import Tiles

_DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.uint8: DType.U8}
_OUT = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8}
_MODES = {"fp32": 0, "bf16": 1, "int8": 2}


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
class Recorder:
    """Writes a recording.

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

    # -- kernels ----------------------------------------------------------------------------------------------------

    def qlinear(
        self, name: str, codes: Tensor, scale: Any, zero_point: Any, row_in: Any, weight: Tiles, weight_scale: Tensor,
        bias: Any = None, act: str = "none", gate: Any = None, residual: Tensor | None = None, row: Any = None,
        out_scale: Any = None, out_zero_point: Any = None, out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.qlinear`."""
        check_weight(name, weight, weight_scale, codes.shape[-1])
        n, k = weight.shape
        x = self._codes(name, codes, _natural(codes))
        made = self._room(name, (*x.shape[:-1], n // 2 if act == "geglu" else n), out)
        residual = self._ordered(name, _like(residual, made), _natural(made))
        args = abi.LinearArgs(
            x=self._at(x), ldx=k, batch=x.shape[0], seq=math.prod(x.shape[1:-1]), k=k, n=n,
            quant=self._quant(name, scale, zero_point, x.shape[:-1]), **self._weight(name, weight, weight_scale),
            epilogue=self._epilogue(
                name, made, made.shape[-1], weight, bias, act, gate, residual, out_scale, out_zero_point
            ),
        )  # fmt: skip
        self._needs(32 * k)
        return self._append(name, "linear", args, made)

    def qconv(
        self, name: str, codes: Tensor, scale: Any, zero_point: Any, row_in: Any, weight: Tiles, weight_scale: Tensor,
        bias: Any = None, stride: int = 1, padding: int = 0, groups: int = 1, act: str = "none", gate: Any = None,
        residual: Tensor | None = None, row: Any = None, out_scale: Any = None, out_zero_point: Any = None,
        out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.qconv`. One by one with stride 1 is a linear."""
        check_weight(name, weight, weight_scale, codes.shape[1])
        n, _, kh, kw = weight.shape
        x = self._codes(name, codes, _channels_last(codes))
        batch, c, h, w = x.shape
        need(weight.groups == groups and stride > 0 and padding >= 0, name, "windows do not fit")
        height, width = ((extent + 2 * padding - kernel) // stride + 1 for extent, kernel in ((h, kh), (w, kw)))
        made = self._room(name, (batch, n, height, width), out, order=(0, 2, 3, 1))
        residual = self._ordered(name, _like(residual, made), _channels_last(made))
        shared = {
            "x": self._at(x), "batch": batch, "n": n, "quant": self._quant(name, scale, zero_point, (batch, h, w)),
            **self._weight(name, weight, weight_scale),
            "epilogue": self._epilogue(name, made, n, weight, bias, act, gate, residual, out_scale, out_zero_point),
        }  # fmt: skip
        if (kh, kw, stride, padding, groups) == (1, 1, 1, 0, 1):
            self._needs(32 * c)
            return self._append(name, "linear", abi.LinearArgs(ldx=c, seq=h * w, k=c, **shared), made)
        self._needs((kh * (w + 2 * padding + kw) + 16 * stride) * (c // groups) + 128 * width)
        args = abi.ConvArgs(
            h=h, w=w, c=c, kh=kh, kw=kw, stride=stride, pad=padding, groups=groups, out_h=height, out_w=width, **shared
        )
        return self._append(name, "conv", args, made)

    def norm(
        self, name: str, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
        act: str = "none", row: Any = None, out_scale: Any = None, out_zero_point: Any = None, out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.norm`."""
        check_values(name, x)
        order = _channels_last(x) if groups else _natural(x)
        x = self._ordered(name, x, order)
        c = x.shape[order[-1]]
        need(groups >= 0 and (not groups or c % groups == 0), name, f"{c} channels are in {groups} groups")
        made = self._room(name, x.shape, out, order)
        args = abi.NormArgs(
            x=self._at(x), out=self._at(made), batch=x.shape[0], seq=x[0].numel() // c, c=c, groups=groups,
            weight=self._row(name, weight, c, x.shape[0]), bias=self._row(name, bias, c, x.shape[0]), eps=eps,
            x_dtype=_DTYPES[x.dtype], out_dtype=_DTYPES[made.dtype], act=Act[act.upper()],
            quant=self._quant(name, out_scale, out_zero_point),
        )  # fmt: skip
        self._needs(12 * c)
        self.shared = max(self.shared, 32 * groups * torch.get_num_threads())
        return self._append(name, "norm", args, made)

    def map(
        self, name: str, x: Tensor, act: str = "none", row: Any = None, out_scale: Any = None,
        out_zero_point: Any = None, out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.map`. Without GEGLU the order of elements does not matter."""
        check_values(name, x)
        paired = act == "geglu"
        order = _natural(x) if paired else _order_of(x)
        x = self._ordered(name, x, order)
        made = self._room(name, (*x.shape[:-1], x.shape[-1] // 2) if paired else x.shape, out, order)
        c = made.shape[order[-1]]
        args = abi.MapArgs(
            x=self._at(x), out=self._at(made), batch=x.shape[0], seq=made[0].numel() // c, c=c,
            ldx=2 * c if paired else c, x_dtype=_DTYPES[x.dtype], out_dtype=_DTYPES[made.dtype],
            act=Act[act.upper()], quant=self._quant(name, out_scale, out_zero_point),
        )  # fmt: skip
        return self._append(name, "map", args, made)

    def gated_add(
        self, name: str, x: Tensor, gate: Any = None, residual: Tensor | None = None, row: Any = None,
        out_scale: Any = None, out_zero_point: Any = None, out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.gated_add`."""
        x = x if residual is None else x.expand(torch.broadcast_shapes(x.shape, residual.shape))
        residual = _like(residual, x)
        check_values(name, x, residual)
        order = _natural(x) if gate is not None else _order_of(x)
        x = self._ordered(name, x, order)
        residual = self._ordered(name, residual, order)
        made = self._room(name, x.shape, out, order)
        c, size = x.shape[order[-1]], x[0].numel()
        args = abi.AddArgs(
            a=self._at(x), b=self._at(residual), out=self._at(made), batch=x.shape[0], seq=size // c, c=c,
            a_entry=size, b_entry=size, gate=self._row(name, gate, c, x.shape[0]), a_dtype=_DTYPES[x.dtype],
            b_dtype=_DTYPES[x.dtype if residual is None else residual.dtype], out_dtype=_DTYPES[made.dtype],
            quant=self._quant(name, out_scale, out_zero_point),
        )  # fmt: skip
        return self._append(name, "add", args, made)

    def attention(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, mode: str,
        row: Any = None, out_scale: Any = None, out_zero_point: Any = None, out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.attention`. The result lies in memory as [B, S, H, D]."""
        batch, heads, queries, d = q.shape
        keys = k.shape[2]
        check_values(name, q, k, v)
        need(k.shape == v.shape == (batch, heads, keys, d) and mode in _MODES, name, "keys do not fit queries")
        need(mask is None or mask.dtype == torch.float32, name, "the mask is not f32")
        q, k, v = (t if t.stride(-1) == 1 else self._ordered(name, t, _natural(t)) for t in (q, k, v))
        made = self._room(name, (batch, heads, queries, d), out, order=(0, 2, 1, 3))
        masked = None if mask is None else mask.expand(batch, heads, queries, keys)
        names = ("mask_entry", "mask_head", "mask_query", "mask_key")
        strides = dict(zip(names, (0, 0, 0, 0) if masked is None else masked.stride(), strict=True))
        args = abi.AttentionArgs(
            q=self._at(q), k=self._at(k), v=self._at(v), mask=self._at(masked), out=self._at(made),
            batch=batch, heads=heads, queries=queries, keys=keys, d=d,
            q_entry=q.stride(0), q_token=q.stride(2), q_head=q.stride(1),
            k_entry=k.stride(0), k_token=k.stride(2), k_head=k.stride(1),
            v_entry=v.stride(0), v_token=v.stride(2), v_head=v.stride(1),
            out_entry=made.stride(0), out_token=made.stride(2), out_head=made.stride(1), **strides,
            scale=scale, q_dtype=_DTYPES[q.dtype], k_dtype=_DTYPES[k.dtype], v_dtype=_DTYPES[v.dtype],
            out_dtype=_DTYPES[made.dtype], mode=_MODES[mode], quant=self._quant(name, out_scale, out_zero_point),
        )  # fmt: skip
        self._needs(500 * d)
        return self._append(name, "attention", args, made)

    def quantize_tokens(self, name: str, x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
        """`tfqc.quantize_tokens`."""
        need(bits == 8, name, f"tokens have {bits} bits")
        check_values(name, x)
        x = self._ordered(name, x, _natural(x))
        tokens = x.shape[:-1] if x.dim() > 2 else (x.shape[0], 1)  # one dimension would be rows of the schedule
        shapes = ((x.shape, torch.uint8), (tokens, torch.float32), (tokens, torch.int32))
        codes, scale, zero = (torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in shapes)
        c = x.shape[-1]
        args = abi.TokenQuantizeArgs(
            x=self._at(x), out=self._at(codes), scale=self._at(scale), zero=self._at(zero),
            tokens=x.numel() // c, c=c, x_dtype=_DTYPES[x.dtype],
        )  # fmt: skip
        self.kept.append((scale, zero))
        return self._append(name, "quantize_tokens", args, codes), scale, zero

    def concat(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Images next to each other along channels."""
        a, b = (self._ordered(name, t, _channels_last(t)) for t in (a, b))
        check_values(name, a, b)
        need(a.shape[:1] + a.shape[2:] == b.shape[:1] + b.shape[2:], name, "images of two sizes are joined")
        shape = (a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:])
        made = self._room(name, shape, torch.promote_types(a.dtype, b.dtype), order=_channels_last(a))
        args = abi.ConcatArgs(
            a=self._at(a), b=self._at(b), out=self._at(made), tokens=a.numel() // a.shape[1], c=a.shape[1],
            c2=b.shape[1], a_dtype=_DTYPES[a.dtype], b_dtype=_DTYPES[b.dtype], out_dtype=_DTYPES[made.dtype],
        )  # fmt: skip
        return self._append(name, "concat", args, made)

    def upsample(self, name: str, x: Tensor, factor: int) -> Tensor:
        """Nearest-neighbour enlargement of images."""
        x = self._ordered(name, x, _channels_last(x))
        batch, c, h, w = x.shape
        made = self._room(name, (batch, c, h * factor, w * factor), x.dtype, order=(0, 2, 3, 1))
        args = abi.UpsampleArgs(
            x=self._at(x), out=self._at(made), batch=batch, h=h, w=w, pixel_bytes=c * x.element_size(), factor=factor
        )
        return self._append(name, "upsample", args, made)

    # -- torch ------------------------------------------------------------------------------------------------------

    def table_read(self, name: str, table: Tensor, row: Tensor) -> TableRows:
        """`tfqc.table_read`, for kernels alone: they go to their rows, nothing is copied."""
        del name, row
        return TableRows(table)

    def request_read(self, name: str, table: Tensor, row: Tensor) -> TableRows:
        """`tfqc.request_read`, for kernels alone."""
        del name, row
        return TableRows(table, request=True)

    def view(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same memory, seen in another way; where that cannot be, a copy that is made at every step."""
        seen = function(*args, **kwargs)
        first = seen[0] if isinstance(seen, (list, tuple)) else seen
        if self.arena is None or first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
            return seen
        self.reorders.append(name)
        return self.torch(name, function, *args, **kwargs)

    def torch(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An operation without a kernel, called at every step."""
        made = function(*args, **kwargs)
        if self.arena is None:
            return made
        several = isinstance(made, (list, tuple))
        args = tuple(map(self._with_spare_rows, args))
        kept = [t.clone() for t in (made if several else [made])]

        def call() -> None:
            again = function(*args, **kwargs)
            for old, new in zip(kept, again if several else [again], strict=True):
                old.copy_(new)

        self.kept.append(kept)
        self.lines.append(Line(name, "torch", kept[0], call=call))
        return kept if several else kept[0]

    def channels_last(self, name: str, x: Tensor) -> Tensor:
        """`tfqc.channels_last`."""
        return self._copied(name, x, self._room(name, x.shape, x.dtype, order=(0, 2, 3, 1)))

    def plain(self, name: str, x: Tensor) -> Tensor:
        """`tfqc.plain`."""
        return self._copied(name, x, torch.empty(x.shape, dtype=torch.float32, device=x.device))

    # -- room and parameters ----------------------------------------------------------------------------------------

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
            residual_ld=width, out_ld=width, out_dtype=_DTYPES[made.dtype], act=Act[act.upper()],
            residual_dtype=_DTYPES[made.dtype if residual is None else residual.dtype],
            quant=self._quant(name, out_scale, out_zero),
        )  # fmt: skip


def _extent(tensor: Tensor) -> int:
    """How many numbers lie from a tensor's first to the end of its memory: tables have spare rows behind them."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() - int(tensor.storage_offset())


def _like(residual: Tensor | None, made: Tensor) -> Tensor | None:
    """A residual for every entry: rows of the schedule may be one for the whole batch."""
    return None if residual is None else residual.expand(made.shape)


def _natural(x: Tensor) -> tuple[int, ...]:
    return tuple(range(x.dim()))


def _channels_last(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()), 1)


def _order_of(x: Tensor) -> tuple[int, ...]:
    """Dimensions from the largest stride to the smallest, the batch first."""
    return (0, *sorted(range(1, x.dim()), key=lambda d: (-x.stride(d), d)))
