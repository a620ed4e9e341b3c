"""Products and quantized values as numpy computes them, and the kernels on the same numbers in the PTX interpreter."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.ptx import Counters, run
from tfqc.backends.cuda_int4.runtime import pack
from tfqc.backends.cuda_int4.runtime.build import MissingCompilerError, compile
from tfqc.backends.cuda_int4.runtime.specialise import Body, Gemm, Kernel, source

F32, F16 = np.float32, np.float16
Array = NDArray[np.generic]
STEPS = 3  # rows of the schedule

_ARCHS: dict[Body, str] = {"s4": "sm_86", "nibble": "sm_90a", "half": "sm_86", "auto": "sm_86"}


@functools.cache
def ptx_of(kernel: Kernel, arch: str = "", change: tuple[str, str] = ("", "")) -> str:
    """What the compiler makes of a kernel, for a chip that runs its body; of its text first one part is changed."""
    arch = arch or (_ARCHS[kernel.body] if isinstance(kernel, Gemm) else "sm_86")
    text = source([kernel])
    assert change[0] in text
    try:
        return compile(text.replace(*change) if change[0] else text, arch, "ptx").image.decode()
    except MissingCompilerError as error:
        pytest.skip(str(error))


def two_a_byte(codes: Array) -> Array:
    """4-bit codes [.., K], the even ones in the low half of a byte."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def one_a_byte(packed: Array) -> Array:
    """The inverse."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


@dataclass
class Problem:
    """Numbers for a product: greatest codes in row 0 of a and column 0 of w, extreme zero points at steps 0 and 1.

    Numbers that f32 sums are made of are multiples of a power of two, so that every order of summing is exact.
    """

    kernel: Gemm
    m: int
    image: Array | None = None  # codes of a convolution's input with its border, [B, H + 2, W + 2, C]
    rows: Array = field(init=False)  # uint8 or f16 [M, K]
    weight: Array = field(init=False)  # int8 [N, K]

    def __post_init__(self) -> None:
        kernel, end = self.kernel, self.kernel.epilogue
        make = np.random.default_rng(kernel.n * 1000 + kernel.k + self.m)
        top = 2**kernel.a_bits - 1
        if self.image is not None:
            self.rows = windows(self.image, kernel)
        elif kernel.mode == "w4a16":
            self.rows = eighths(make, self.m, kernel.k)
        else:
            self.rows = make.integers(0, top + 1, (self.m, kernel.k), np.uint8)
            self.rows[0] = top
        self.weight = make.integers(-8, 8, (kernel.n, kernel.k), np.int8)
        self.weight[0] = -8
        parameters = {"one": 1, "step": STEPS, "token": self.m}
        self.zero = make.integers(0, top + 1, parameters[end.scales]).astype(np.int32)
        self.zero[1:2] = top
        self.zero[:1] = 0
        self.scale = make.uniform(0.5, 1.5, self.zero.shape).astype(F32) / F32(top)
        self.weight_scale = make.uniform(0.5, 1.5, kernel.n).astype(F32) / F32(2 * kernel.k**0.5)
        if kernel.group is not None:
            groups = -(-kernel.k // kernel.group)
            if kernel.mode == "w4a16":
                self.weight_scale = make.choice([0.125, 0.5, 0.75], (groups, kernel.n)).astype(F16)
            else:
                self.weight_scale = self.weight_scale * make.uniform(0.5, 2, (groups, 1)).astype(F32)
        self.bias = make.normal(size=(STEPS if end.bias == "step" else 1, kernel.n)).astype(F32)
        width = kernel.n // 2 if kernel.paired else kernel.n
        self.residual = make.normal(size=(self.m, width)).astype(F16)
        self.low, self.up = eighths(make, self.m, end.rank), eighths(make, kernel.n, end.rank)
        self.out_top = 15 if end.out == "u4" else 255
        if not kernel.paired and end.out != "s32":
            self._cancel()
        outs = parameters[end.out_scales]
        self.out_inverse = make.uniform(1, 3, outs).astype(F32) * F32(self.out_top / 15)
        self.out_zero = make.integers(0, self.out_top + 1, outs).astype(np.int32)

    def _cancel(self) -> None:
        """In every other column the bias takes one row's product away: what is left are rounding errors alone."""
        columns = np.arange(0, self.kernel.n, 2)
        rows = columns % self.m
        for step in range(len(self.bias)):
            self.bias[step, columns] = -self.product(step)[rows, columns]
        self.residual[rows, columns] = 0

    def run(
        self, step: int, change: tuple[str, str] = ("", ""), block: tuple[int, int] | None = None
    ) -> tuple[Array, Counters]:
        """What the kernel, or one block of it, writes at a step, one number for each output; and what it cost."""
        kernel, end = self.kernel, self.kernel.epilogue
        tile_n, paired = kernel.tile.n, kernel.paired
        a = self.rows if self.image is None else self.image
        width = self.residual.shape[1]
        codes = end.out in ("u4", "u8")
        pitch = -(-width // 32) * 32 if codes else width
        kinds = {"f16": F16, "s32": np.int32, "u8": np.uint8, "u4": np.uint8}
        out = np.full((self.m, pitch // 2 if end.out == "u4" else pitch), 77, kinds[end.out])

        def columns(values: Array) -> Array:
            return pack.columns(torch.from_numpy(values), tile_n, paired).numpy()

        weight = torch.from_numpy(self.weight)
        given: dict[str, Array] = {
            "a": two_a_byte(a) if kernel.a_bits == 4 else a,
            "weight": pack.pack(weight, kernel.mode, tile_n, paired).numpy(),
            "weight_sum": pack.weight_sums(weight, tile_n, paired, kernel.group).numpy(),
            "weight_scale": columns(self.weight_scale),
            "bias": columns(self.bias),
            "scale": self.scale,
            "zero": self.zero,
            "step": np.array([step], np.int32),
            "residual": self.residual,
            "low": self.low,
            "up": pack.pack_up(torch.from_numpy(self.up), tile_n, paired).numpy(),
            "out_inverse": self.out_inverse,
            "out_zero": self.out_zero,
            "out": out,
            "m": np.int32(self.m),
        }
        if kernel.mode == "w4a16":
            given |= dict.fromkeys(("weight_sum", "scale", "zero"), np.uint64(0))
        if not end.rank:
            given |= dict.fromkeys(("low", "up"), np.uint64(0))
        arguments = [given[name] for name in kernel.arguments]
        text, shared = ptx_of(kernel, change=change), kernel.shared_bytes
        only = None if block is None else [(*block, 0)]
        done = run(text, kernel.name, kernel.grid(self.m), (kernel.threads, 1, 1), arguments, shared, blocks=only)
        if end.out == "u4":
            out = one_a_byte(out)
        if codes:  # beyond N, for the next layer to multiply by zeros, the code of 0
            assert (out[:, width:] == self.out_zero[step if end.out_scales == "step" else 0]).all()
        return out[:, :width], done

    def before_activation(self, step: int) -> Array:
        """y f32 [M, N] as the epilogue has it before its activation; each operation rounded to f32."""
        bias = self.kernel.epilogue.bias
        return self.product(step) + (F32(0) if bias == "none" else self.bias[step if bias == "step" else 0])

    def product(self, step: int) -> Array:
        """The same without bias: with the branch of low rank, added for each 16 ranks and rounded once."""
        y = self.scaled(step)
        for rank in range(0, self.kernel.epilogue.rank, 16):
            its = slice(rank, rank + 16)
            y = (y + self.low[:, its].astype(np.float64) @ self.up[:, its].T.astype(np.float64)).astype(F32)
        return y

    def scaled(self, step: int) -> Array:
        """The same without the branch of low rank."""
        if self.kernel.mode == "w4a16":
            if self.kernel.group is None:
                return self.sums(step).astype(F32) * self.weight_scale
            return (self.rows.astype(np.float64) @ self.dequantized().T.astype(np.float64)).astype(F32)
        scales = self.kernel.epilogue.scales
        scale = self.scale if scales == "token" else self.scale[[step if scales == "step" else 0]]
        if self.kernel.group is None:
            return self.sums(step).astype(F32) * (scale[:, None] * self.weight_scale)
        total = np.zeros((self.m, self.kernel.n), F32)
        for group, its in enumerate(self.weight_scale):
            total = total + self.sums(step, group=group).astype(F32) * its
        return total * scale[:, None]

    def dequantized(self) -> Array:
        """f16 [N, K]: codes times their group's scale, rounded once."""
        assert self.kernel.group is not None
        scales = np.repeat(self.weight_scale, self.kernel.group, 0)[: self.kernel.k]
        return self.weight.astype(F16) * scales.T

    def sums(
        self, step: int, rows: slice = slice(None), columns: slice = slice(None), group: int | None = None
    ) -> Array:
        """acc - zero * weight_sum, exactly; of f16, acc in f64; of one group or of all inputs."""
        inputs = slice(None) if group is None else slice(group * 128, (group + 1) * 128)
        if self.kernel.mode == "w4a16":
            return self.rows[rows].astype(np.float64) @ self.weight[columns].T.astype(np.float64)
        end = self.kernel.epilogue
        zero = self.zero[rows] if end.scales == "token" else self.zero[[step if end.scales == "step" else 0]]
        centred = self.rows[rows, inputs].astype(np.int64) - zero[:, None]
        return (centred @ self.weight[columns, inputs].T.astype(np.int64)).astype(np.int32)

    def want(self, step: int) -> Array:
        """What the kernel is to write, in f32, before it is rounded to f16 or to codes."""
        y = activate(self.before_activation(step), self.kernel.epilogue.activation)
        return y + self.residual.astype(F32) if self.kernel.epilogue.residual else y

    def codes(self, y: Array, step: int) -> Array:
        """Codes of values for the next layer."""
        row = step if self.kernel.epilogue.out_scales == "step" else 0
        return quantize(y, self.out_inverse[row], self.out_zero[row], self.out_top)


def eighths(make: np.random.Generator, *shape: int) -> Array:
    """f16 between -2 and 2 whose products have exact sums."""
    return (make.integers(-16, 17, shape) / 8).astype(F16)


def quantize(y: Array, inverse: Array, zero: Array, top: int) -> Array:
    """clamp(rint(y * inverse) + zero, 0, top) in f32."""
    return np.clip(np.rint(y * inverse) + zero, 0, top).astype(np.uint8)


def activate(y: Array, activation: str) -> Array:
    """In f64, rounded to f32."""
    if activation == "none":
        return y
    wide = torch.from_numpy(y.astype(np.float64))
    if activation == "silu":
        return torch.nn.functional.silu(wide).numpy().astype(F32)
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.nn.functional.gelu(wide, approximate=approximate).numpy().astype(F32)
    value, gate = wide.chunk(2, -1)
    return (value * torch.nn.functional.gelu(gate)).numpy().astype(F32)


def windows(image: Array, kernel: Gemm) -> Array:
    """Rows [B * OH * OW, 9 * C] of 3 x 3 windows over an image that has its border."""
    assert kernel.window is not None
    stride = kernel.window.stride
    seen = np.lib.stride_tricks.sliding_window_view(image, (3, 3), (1, 2))[:, ::stride, ::stride]
    return np.moveaxis(seen, 3, -1).reshape(-1, 9 * image.shape[-1])
