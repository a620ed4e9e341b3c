"""From the lines of a model's `step` to a list of commands for kernels: written once for each shape of the inputs.

`Recorder` has a method for each kernel. It finds room for the result, fills the kernel's struct, and gives back a
tensor that lies where the result will lie. Views are taken of such tensors with torch; operations without a kernel
become calls of torch between the kernels. `Eager` has the same methods and computes at once, where no kernels can be
built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfqc.backends.cpu_int8.runtime import abi
from tfqc.backends.cpu_int8.runtime.abi import Act
from tfqc.backends.cpu_int8.runtime.draft import DTYPES, Draft, Line, TableRows, channels_last, like, natural, order_of
from tfqc.backends.cpu_int8.runtime.fitting import check_values, check_weight, need
from tfqc.backends.cpu_int8.runtime.tiles import Tiles

_MODES = {"fp32": 0, "bf16": 1, "int8": 2}


@dataclass
class Recorder(Draft):
    """A method for each kernel, and for what torch runs."""

    def qlinear(
        self, name: str, codes: Tensor, scale: Any, zero_point: Any, row_in: Any, weight: Tiles, weight_scale: Tensor,
        bias: Any = None, act: str = "none", gate: Any = None, residual: Tensor | None = None, row: Any = None,
        out_scale: Any = None, out_zero_point: Any = None, out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.qlinear`."""
        check_weight(name, weight, weight_scale, codes.shape[-1])
        n, k = weight.shape
        x = self._codes(name, codes, natural(codes))
        made = self._room(name, (*x.shape[:-1], n // 2 if act == "geglu" else n), out)
        residual = self._ordered(name, like(residual, made), natural(made))
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
        x = self._codes(name, codes, channels_last(codes))
        batch, c, h, w = x.shape
        need(weight.groups == groups and stride > 0 and padding >= 0, name, "windows do not fit")
        height, width = ((extent + 2 * padding - kernel) // stride + 1 for extent, kernel in ((h, kh), (w, kw)))
        made = self._room(name, (batch, n, height, width), out, order=(0, 2, 3, 1))
        residual = self._ordered(name, like(residual, made), channels_last(made))
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
        order = channels_last(x) if groups else natural(x)
        x = self._ordered(name, x, order)
        c = x.shape[order[-1]]
        need(groups >= 0 and (not groups or c % groups == 0), name, f"{c} channels are in {groups} groups")
        made = self._room(name, x.shape, out, order)
        args = abi.NormArgs(
            x=self._at(x), out=self._at(made), batch=x.shape[0], seq=x[0].numel() // c, c=c, groups=groups,
            weight=self._row(name, weight, c, x.shape[0]), bias=self._row(name, bias, c, x.shape[0]), eps=eps,
            x_dtype=DTYPES[x.dtype], out_dtype=DTYPES[made.dtype], act=Act[act.upper()],
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
        order = natural(x) if paired else order_of(x)
        x = self._ordered(name, x, order)
        made = self._room(name, (*x.shape[:-1], x.shape[-1] // 2) if paired else x.shape, out, order)
        c = made.shape[order[-1]]
        args = abi.MapArgs(
            x=self._at(x), out=self._at(made), batch=x.shape[0], seq=made[0].numel() // c, c=c,
            ldx=2 * c if paired else c, x_dtype=DTYPES[x.dtype], out_dtype=DTYPES[made.dtype],
            act=Act[act.upper()], quant=self._quant(name, out_scale, out_zero_point),
        )  # fmt: skip
        return self._append(name, "map", args, made)

    def gated_add(
        self, name: str, x: Tensor, gate: Any = None, residual: Tensor | None = None, row: Any = None,
        out_scale: Any = None, out_zero_point: Any = None, out: str = "f32",
    ) -> Tensor:  # fmt: skip
        """`tfqc.gated_add`."""
        x = x if residual is None else x.expand(torch.broadcast_shapes(x.shape, residual.shape))
        residual = like(residual, x)
        check_values(name, x, residual)
        order = natural(x) if gate is not None else order_of(x)
        x = self._ordered(name, x, order)
        residual = self._ordered(name, residual, order)
        made = self._room(name, x.shape, out, order)
        c, size = x.shape[order[-1]], x[0].numel()
        args = abi.AddArgs(
            a=self._at(x), b=self._at(residual), out=self._at(made), batch=x.shape[0], seq=size // c, c=c,
            a_entry=size, b_entry=size, gate=self._row(name, gate, c, x.shape[0]), a_dtype=DTYPES[x.dtype],
            b_dtype=DTYPES[x.dtype if residual is None else residual.dtype], out_dtype=DTYPES[made.dtype],
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
        q, k, v = (t if t.stride(-1) == 1 else self._ordered(name, t, natural(t)) for t in (q, k, v))
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
            scale=scale, q_dtype=DTYPES[q.dtype], k_dtype=DTYPES[k.dtype], v_dtype=DTYPES[v.dtype],
            out_dtype=DTYPES[made.dtype], mode=_MODES[mode], quant=self._quant(name, out_scale, out_zero_point),
        )  # fmt: skip
        self._needs(500 * d)
        return self._append(name, "attention", args, made)

    def quantize_tokens(self, name: str, x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
        """`tfqc.quantize_tokens`."""
        need(bits == 8, name, f"tokens have {bits} bits")
        check_values(name, x)
        x = self._ordered(name, x, natural(x))
        tokens = x.shape[:-1] if x.dim() > 2 else (x.shape[0], 1)  # one dimension would be rows of the schedule
        shapes = ((x.shape, torch.uint8), (tokens, torch.float32), (tokens, torch.int32))
        codes, scale, zero = (torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in shapes)
        c = x.shape[-1]
        args = abi.TokenQuantizeArgs(
            x=self._at(x), out=self._at(codes), scale=self._at(scale), zero=self._at(zero),
            tokens=x.numel() // c, c=c, x_dtype=DTYPES[x.dtype],
        )  # fmt: skip
        self.kept.append((scale, zero))
        return self._append(name, "quantize_tokens", args, codes), scale, zero

    def concat(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Images next to each other along channels."""
        a, b = (self._ordered(name, t, channels_last(t)) for t in (a, b))
        check_values(name, a, b)
        need(a.shape[:1] + a.shape[2:] == b.shape[:1] + b.shape[2:], name, "images of two sizes are joined")
        shape = (a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:])
        made = self._room(name, shape, torch.promote_types(a.dtype, b.dtype), order=channels_last(a))
        args = abi.ConcatArgs(
            a=self._at(a), b=self._at(b), out=self._at(made), tokens=a.numel() // a.shape[1], c=a.shape[1],
            c2=b.shape[1], a_dtype=DTYPES[a.dtype], b_dtype=DTYPES[b.dtype], out_dtype=DTYPES[made.dtype],
        )  # fmt: skip
        return self._append(name, "concat", args, made)

    def upsample(self, name: str, x: Tensor, factor: int) -> Tensor:
        """Nearest-neighbour enlargement of images."""
        x = self._ordered(name, x, channels_last(x))
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
