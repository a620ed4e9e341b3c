"""What the lines of an emitted step call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tfqc.backends.cuda_int4.runtime import pack
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Kernel
from tfqc.backends.cuda_int4.runtime.tensors import Tensors

Scales = tuple[str, str] | tuple[Tensor, Tensor] | None
"""A scale and a zero point: names of tensors with rows of the schedule, or one of each for every token."""

ours = torch.ops.tfqc_cuda


class Launches:
    """Kernels by name, on values and on tensors by name, at one step of the schedule."""

    def __init__(self, kernels: Mapping[str, tuple[Kernel, int]], tensors: Tensors, step: Tensor) -> None:
        self._kernels, self._tensors, self._step = kernels, tensors, step

    def quantize(self, kernel: str, x: Tensor, scale: str, zero_point: str, down: str | None = None) -> Any:
        """Codes of x f16 [..., C], as rows or as an image with a border; with `down` [C, r] also x @ down."""
        inverse, zero = self._inverse(scale), self._tensors.form(zero_point, "rows")
        if down is not None:
            packed = self._tensors.form(down, "packed", pack.pack_down)
            return ours.quantize_low_rank(x, inverse, zero, self._step, packed, self._kernels[kernel][1])
        return ours.quantize(x, inverse, zero, self._step, self._kernels[kernel][1])

    def quantize_tokens(self, kernel: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points of the tokens of x f16 [..., C]."""
        return ours.quantize_tokens(x, self._kernels[kernel][1])

    def copy(self, kernel: str, x: Tensor) -> Tensor:
        """x f16 [..., C] with its channels padded, and a border around images."""
        return ours.copy(x, self._kernels[kernel][1])

    def product(
        self,
        kernel: str,
        codes: Tensor,
        weight: str,
        weight_scale: str,
        scales: Scales,
        bias: str | None = None,
        residual: Tensor | None = None,
        low: Tensor | None = None,
        up: str | None = None,
        out_scales: tuple[str, str] | None = None,
    ) -> Tensor:
        """codes [..., bytes] times the packed weight, and what follows: [..., N] in f16, or codes."""
        its, number = self._kernels[kernel]
        assert isinstance(its, Gemm)
        read, form = self._tensors.get, self._tensors.form
        columns = ("columns", its.tile.n, its.paired)

        def padded(values: Tensor) -> Tensor:
            return pack.columns(values.reshape(-1, its.n), its.tile.n, its.paired)

        def of_groups(values: Tensor) -> Tensor:
            if its.group is None:
                return padded(values)
            return padded(values.T.to(torch.float16) if its.mode == "w4a16" else values.T)

        def packed_up(values: Tensor) -> Tensor:
            return pack.pack_up(values.T, its.tile.n, its.paired)

        if scales is None:
            scale = zero = None
        elif isinstance(scales[0], str):
            scale, zero = (form(str(name), "rows") for name in scales)
        else:
            scale, zero = scales
        return ours.product(
            codes, read(f"{weight}.packed"), read(f"{weight}.sums"), form(weight_scale, columns, of_groups),
            None if bias is None else form(bias, columns, padded), scale, zero, self._step, residual,
            low, None if up is None else form(up, columns, packed_up),
            None if out_scales is None else self._inverse(out_scales[0]),
            None if out_scales is None else form(out_scales[1], "rows"), number,
        )  # fmt: skip

    def _inverse(self, scale: str) -> Tensor:
        return self._tensors.form(scale, "inverse", lambda x: 1.0 / x)
