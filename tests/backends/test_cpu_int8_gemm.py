"""Linear layers and convolutions of the int8 CPU backend against float64 torch, for each instruction set of this CPU.

Sums of products are exact integers, and are tested bit for bit. What follows them differs from float64's by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.backends.kernels import DTYPES, EVERY_ISA, Guarded, at_end, by_row, run
from tfqc.backends.cpu_int8.runtime import abi
from tfqc.runtime import tiles

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
ACTS: dict[abi.Act, Callable[[Tensor], Tensor]] = {
    abi.Act.NONE: lambda x: x,
    abi.Act.SILU: F.silu,
    abi.Act.GELU: F.gelu,
    abi.Act.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    abi.Act.GEGLU: lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
}
T = 4  # rows of the schedule
SCRATCH = 4 << 20

some = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
threads = st.sampled_from([1, 2, 3])


def by_token(values: Tensor) -> abi.Rows:
    """Parameters [batch, seq], the same for each row of the schedule."""
    return abi.Rows(values.data_ptr(), 0, values.shape[1], 1)


@dataclass
class Epilogue:
    """What follows a product of n columns and `seq` tokens in each entry; tensors live as long as it does."""

    batch: int
    seq: int
    n: int
    act: abi.Act = abi.Act.NONE
    out: torch.dtype = F32
    bias: bool = True
    gate: bool = False
    residual: torch.dtype | None = None
    per_token: bool = False
    in_place: bool = False  # the output overwrites the residual, where they have one type

    def make(self, rows: list[int], random: torch.Generator) -> abi.Epilogue:
        batch, seq, n = self.batch, self.seq, self.n
        self.width = n // 2 if self.act == abi.Act.GEGLU else n
        self.rows, self.ld = torch.tensor(rows), self.width + 3
        self.target = Guarded((batch, seq, self.ld), self.out)
        self.target.tensor.zero_()
        self.bias_of = torch.randn(T, n, generator=random) if self.bias else None
        geglu = self.act == abi.Act.GEGLU
        bias = self._bias = None if self.bias_of is None else at_end(_in_columns(self.bias_of, geglu))
        self.gate_of = at_end(torch.randn(batch, self.width, generator=random)) if self.gate else None
        self.residual_of = None
        if self.residual is not None:
            values = torch.randn(batch, seq, self.ld, generator=random)
            values = (values * 20 + 100 if self.residual == U8 else values).to(self.residual)
            self.residual_of = at_end(values)
        overwrites = self.in_place and self.residual == self.out
        if overwrites and self.residual_of is not None:
            self.target.tensor[..., : self.width] = self.residual_of[..., : self.width]
        shape = (batch, seq) if self.per_token else (T,)
        self.scale = at_end(torch.rand(shape, generator=random) * 0.05 + 0.002)
        self.zero = at_end(torch.randint(0, 256, shape, generator=random, dtype=torch.int32))
        place = by_token if self.per_token else by_row
        gate, residual = self.gate_of, self.residual_of
        return abi.Epilogue(
            bias=by_row(bias),
            gate=abi.Rows(gate.data_ptr(), 0, self.width, 0) if gate is not None else abi.Rows(),
            residual=self.target.pointer if overwrites else residual.data_ptr() if residual is not None else None,
            out=self.target.pointer, residual_ld=self.ld, out_ld=self.ld,
            residual_dtype=DTYPES[self.residual or F32], out_dtype=DTYPES[self.out], act=self.act,
            quant=abi.Quant(place(self.scale), place(self.zero)),
        )  # fmt: skip

    def check(self, product: Tensor) -> None:
        """That the output is what follows from `product`, float64 [batch, seq, n]."""
        y = product
        if self.bias_of is not None:
            y = y + self.bias_of[self.rows][:, None].double()
        y = ACTS[self.act](y)
        if self.gate_of is not None:
            y = y * self.gate_of[:, None].double()
        if self.residual_of is not None:
            y = y + self.residual_of[..., : self.width].double()
        got, off = self.target.tensor[..., : self.width], 1e-5 + 2e-6 * y.abs()
        assert not self.target.tensor[..., self.width :].any()
        if self.out == U8:
            low, high = (self._codes(y + by) for by in (-off, off))
            assert ((low <= got) & (got <= high)).all()
        else:
            rounding = 2.0**-8 * y.abs() if self.out == BF16 else 0.0
            assert ((got.double() - y).abs() <= off + rounding).all()

    def _codes(self, y: Tensor) -> Tensor:
        scale, zero = (t if self.per_token else t[self.rows][:, None] for t in (self.scale, self.zero))
        return (torch.round(y * (1 / scale[..., None]).double()) + zero[..., None]).clamp(0, 255)


def _in_columns(bias: Tensor, geglu: bool) -> Tensor:
    """Bias in the order of the packed columns, and without padding."""
    return tiles.columns(bias, 1, geglu) if geglu else bias


def linear(
    isa: str, batch: int, seq: int, k: int, n: int, seed: int, threads: int = 1, spare: int = 0,
    scratch: int = SCRATCH, memory: int = 0xAA, **epilogue: Any,
) -> Tensor:  # fmt: skip
    """Runs and checks a linear layer on random codes; returns what it stores."""
    random = torch.Generator().manual_seed(seed)
    made = Epilogue(batch, seq, n, **epilogue)
    geglu = made.act == abi.Act.GEGLU
    rows = torch.randint(0, T, (batch,), generator=random).tolist()
    # No byte beyond the last row's.
    codes_x = at_end(torch.randint(0, 256, ((k + spare) * (batch * seq - 1) + k,), generator=random, dtype=U8))
    x = codes_x.as_strided((batch, seq, k), ((k + spare) * seq, k + spare, 1))
    codes = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
    shape = (batch, seq) if made.per_token else (T,)
    scale = at_end(torch.rand(shape, generator=random) * 0.01 + 0.001)
    zero = at_end(torch.randint(0, 256, shape, generator=random, dtype=torch.int32))
    weight_scale = (torch.rand(n, generator=random) + 0.5) * 0.01 / k**0.5
    packed, sums = at_end(tiles.pack(codes, 1, geglu)), at_end(tiles.sums(codes, 1, geglu))
    scales = at_end(tiles.columns(weight_scale, 1, geglu))
    place = by_token if made.per_token else by_row
    args = abi.LinearArgs(
        x=x.data_ptr(), ldx=k + spare, batch=batch, seq=seq, k=k, n=n,
        quant=abi.Quant(place(scale), place(zero)), weight=packed.data_ptr(), weight_scale=scales.data_ptr(),
        weight_sum=sums.data_ptr(), epilogue=made.make(rows, random),
    )  # fmt: skip
    run(isa, "linear", args, rows, threads, scratch, filled=memory)
    s, z = (t if made.per_token else t[made.rows][:, None] for t in (scale, zero))
    sums_of_products = (x.double() - z[..., None].double()) @ codes.double().T
    made.check(sums_of_products * s[..., None].double() * weight_scale.double())
    return made.target.tensor


def conv(
    isa: str, batch: int, size: tuple[int, int], c: int, n: int, kernel: tuple[int, int], stride: int, pad: int,
    groups: int, seed: int, threads: int = 1, memory: int = 0xAA, **epilogue: Any,
) -> Tensor:  # fmt: skip
    """Runs and checks a convolution on random codes; returns what it stores."""
    random = torch.Generator().manual_seed(seed)
    h, w = size
    x = at_end(torch.randint(0, 256, (batch, h, w, c), generator=random, dtype=U8))
    codes = torch.randint(-128, 128, (n, c // groups, *kernel), generator=random, dtype=torch.int8)
    rows = torch.randint(0, T, (batch,), generator=random).tolist()
    scale = at_end(torch.rand(T, generator=random) * 0.01 + 0.001)
    zero = at_end(torch.randint(0, 256, (T,), generator=random, dtype=torch.int32))
    weight_scale = (torch.rand(n, generator=random) + 0.5) * 0.01 / codes[0].numel() ** 0.5
    image = x.permute(0, 3, 1, 2).double() - zero[rows, None, None, None].double()
    exact = F.conv2d(F.pad(image, (pad,) * 4), codes.double(), stride=stride, groups=groups)
    out_h, out_w = exact.shape[2:]
    made = Epilogue(batch, out_h * out_w, n, **epilogue)
    packed, sums = at_end(tiles.pack(codes, groups)), at_end(tiles.sums(codes, groups))
    scales = at_end(tiles.columns(weight_scale, groups))
    args = abi.ConvArgs(
        x=x.data_ptr(), batch=batch, h=h, w=w, c=c, n=n, kh=kernel[0], kw=kernel[1], stride=stride, pad=pad,
        groups=groups, out_h=out_h, out_w=out_w, quant=abi.Quant(by_row(scale), by_row(zero)),
        weight=packed.data_ptr(), weight_scale=scales.data_ptr(), weight_sum=sums.data_ptr(),
        epilogue=made.make(rows, random),
    )  # fmt: skip
    run(isa, "conv", args, rows, threads, SCRATCH, filled=memory)
    product = exact.flatten(2).transpose(1, 2) * scale[rows, None, None].double() * weight_scale.double()
    made.check(product)
    return made.target.tensor


epilogues = st.fixed_dictionaries(
    {
        "act": st.sampled_from([abi.Act.NONE, abi.Act.SILU, abi.Act.GELU, abi.Act.GELU_TANH]),
        "out": st.sampled_from([F32, BF16, U8]),
        "bias": st.booleans(),
        "gate": st.booleans(),
        "residual": st.sampled_from([None, F32, BF16, U8]),
        "in_place": st.booleans(),
    }
)


@EVERY_ISA
@some
@given(
    st.integers(1, 4), st.integers(1, 90), st.integers(1, 200), st.integers(1, 100), seeds, threads,
    st.sampled_from([0, 1, 64]), epilogues, st.booleans(),
)  # fmt: skip
@example(1, 1, 1, 1, 0, 3, 0, {}, False)
@example(2, 600, 1000, 40, 0, 2, 0, {"out": U8}, False)  # several blocks of rows, which the second entry begins amid
@example(1, 40, 5120, 33, 0, 2, 0, {"out": BF16}, True)
def test_linear(
    isa: str, batch: int, seq: int, k: int, n: int, seed: int, threads: int, spare: int, epilogue: dict[str, Any],
    per_token: bool,
) -> None:  # fmt: skip
    linear(isa, batch, seq, k, n, seed, threads, spare, per_token=per_token, **epilogue)


@EVERY_ISA
@some
@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 200), st.integers(1, 4), seeds, threads, epilogues)
def test_geglu(
    isa: str, batch: int, seq: int, k: int, pairs: int, seed: int, threads: int, epilogue: dict[str, Any]
) -> None:
    linear(isa, batch, seq, k, 32 * pairs, seed, threads, **{**epilogue, "act": abi.Act.GEGLU})


@EVERY_ISA
@some
@given(
    st.integers(1, 3), st.tuples(st.integers(1, 20), st.integers(1, 40)),
    st.sampled_from([1, 3, 4, 8, 31, 32, 48, 63, 64, 65, 96, 192]), st.integers(1, 40),
    st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 2, 3, 5])), st.sampled_from([1, 2, 3]),
    st.integers(0, 2), st.sampled_from([1, 1, 2, 3]), seeds, threads, epilogues,
)  # fmt: skip
@example(1, (64, 64), 320, 16, (3, 3), 1, 1, 1, 0, 1, {})  # several blocks
@example(3, (8, 8), 128, 48, (3, 3), 1, 1, 1, 0, 2, {})  # threads begin amid an image
@example(1, (33, 70), 130, 20, (3, 3), 2, 1, 1, 0, 3, {})
def test_conv(
    isa: str, batch: int, size: tuple[int, int], c: int, n: int, kernel: tuple[int, int], stride: int, pad: int,
    groups: int, seed: int, threads: int, epilogue: dict[str, Any],
) -> None:  # fmt: skip
    size = (max(size[0], kernel[0]), max(size[1], kernel[1]))
    conv(isa, batch, size, c * groups, n * groups, kernel, stride, pad, groups, seed, threads, **epilogue)


def exact_linear(isa: str, x: Tensor, w: Tensor, zero: int, threads: int = 1) -> None:
    """That x [M, K] and w [N, K], with scales of 1, give their sums of products, rounded to f32 once."""
    (m, k), n = x.shape, len(w)
    packed, sums = at_end(tiles.pack(w)), at_end(tiles.sums(w))
    ones, out = at_end(tiles.columns(torch.ones(n))), Guarded((m, n), F32)
    scale, zeros = torch.ones(1), torch.tensor([zero], dtype=torch.int32)
    args = abi.LinearArgs(
        x=(x := at_end(x)).data_ptr(), ldx=k, batch=1, seq=m, k=k, n=n, quant=abi.Quant(by_row(scale), by_row(zeros)),
        weight=packed.data_ptr(), weight_scale=ones.data_ptr(), weight_sum=sums.data_ptr(),
        epilogue=abi.Epilogue(out=out.pointer, out_ld=n),
    )  # fmt: skip
    run(isa, "linear", args, [0], threads, SCRATCH + 64 * k)
    assert torch.equal(out.tensor, ((x.double() - zero) @ w.double().T).float())


ENDS = [(255, -128), (255, 127), (0, -128), (None, None)]


def filled(shape: tuple[int, ...], value: int | None, dtype: torch.dtype) -> Tensor:
    """One value everywhere, or random ones."""
    ends = torch.iinfo(dtype)
    random = torch.Generator().manual_seed(len(shape))
    return torch.randint(ends.min, ends.max + 1, shape, generator=random, dtype=dtype) if value is None else (
        torch.full(shape, value, dtype=dtype))  # fmt: skip


@EVERY_ISA
@pytest.mark.parametrize(("x", "w"), ENDS)
def test_sums_are_exact(isa: str, x: int | None, w: int | None) -> None:
    for zero in (0, 255):
        exact_linear(isa, filled((33, 23040), x, U8), filled((17, 23040), w, torch.int8), zero)


@EVERY_ISA
@pytest.mark.parametrize(("x", "w"), ENDS)
@pytest.mark.parametrize("k", [65536, 65537, 65793, 65794, 66311, 66312, 131073, 200_000])
def test_sums_that_32_bits_do_not_hold(isa: str, k: int, x: int | None, w: int | None) -> None:
    """The least k that they may not hold is 2^31 / (255 * 128)."""
    for zero in (0, 255):
        exact_linear(isa, filled((19, k), x, U8), filled((18, k), w, torch.int8), zero, threads=2)


@EVERY_ISA
@pytest.mark.parametrize("epilogue", [{}, {"act": abi.Act.GEGLU}, {"out": U8, "per_token": True, "residual": BF16}])
def test_what_follows_long_sums(isa: str, epilogue: dict[str, Any]) -> None:
    linear(isa, 2, 21, 70_001, 64, 3, 2, scratch=16 << 20, **epilogue)


@EVERY_ISA
def test_a_convolution_with_long_sums(isa: str) -> None:
    """Nothing but extremes: sums of 7 * 7 * 2048 products go beyond 32 bits."""
    c, n = 2048, 3
    x, w = filled((1, 8, 8, c), 255, U8), filled((n, c, 7, 7), -128, torch.int8)
    packed, sums, out = at_end(tiles.pack(w, 1)), at_end(tiles.sums(w, 1)), Guarded((4, n), F32)
    ones, scale, zero = at_end(tiles.columns(torch.ones(n))), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    args = abi.ConvArgs(
        x=(x := at_end(x)).data_ptr(), batch=1, h=8, w=8, c=c, n=n, kh=7, kw=7, stride=1, pad=0, groups=1, out_h=2,
        out_w=2, quant=abi.Quant(by_row(scale), by_row(zero)),
        weight=packed.data_ptr(), weight_scale=ones.data_ptr(), weight_sum=sums.data_ptr(),
        epilogue=abi.Epilogue(out=out.pointer, out_ld=n),
    )  # fmt: skip
    run(isa, "conv", args, [0], 1, SCRATCH)
    assert (out.tensor == -128.0 * 255 * 49 * c).all()


@EVERY_ISA
def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    of_linear = [linear(isa, 2, 150, 640, 96, 0, threads, out=F32, act=abi.Act.GEGLU) for threads in (1, 2, 3)]
    of_conv = [conv(isa, 2, (17, 19), 64, 48, (3, 3), 1, 1, 1, 0, threads, act=abi.Act.SILU) for threads in (1, 2, 3)]
    for first, *others in (of_linear, of_conv):
        assert all(torch.equal(first, other) for other in others)


@EVERY_ISA
def test_what_lay_in_scratch_changes_nothing(isa: str) -> None:
    """Inputs and channels that fill up a step are whatever lay there, and meet weights of 0."""
    for memory in (0, 0xFF):
        linear(isa, 2, 21, 70, 33, 0, memory=memory)
        linear(isa, 1, 3, 65_600, 5, 0, memory=memory)
        conv(isa, 2, (9, 7), 65, 20, (3, 3), 1, 1, 1, 0, memory=memory)
        conv(isa, 1, (9, 7), 10, 20, (3, 3), 2, 1, 2, 0, memory=memory)


@some
@given(st.integers(1, 70), st.integers(1, 200), st.booleans(), seeds)
def test_linear_weights_come_back(n: int, k: int, geglu: bool, seed: int) -> None:
    n = 32 * n if geglu else n
    codes = torch.randint(-128, 128, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = tiles.pack(codes, 1, geglu)
    assert packed.shape == (-(-n // 16), -(-k // 64), 16, 16, 4)
    assert torch.equal(tiles.unpack(packed, (n, k), 1, geglu, 8), codes)
    assert torch.equal(packed.sum((1, 2, 4), dtype=torch.int32).flatten(), tiles.sums(codes, 1, geglu))


@some
@given(
    st.integers(1, 20), st.integers(1, 130), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), seeds
)  # fmt: skip
def test_convolution_weights_come_back(n: int, channels: int, kh: int, kw: int, groups: int, seed: int) -> None:
    shape = (n * groups, channels, kh, kw)
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = tiles.pack(codes, groups)
    assert torch.equal(tiles.unpack(packed, shape, groups, False, 8), codes)
    sums = packed.sum((2, 3, 5), dtype=torch.int32).flatten()
    assert torch.equal(sums, tiles.sums(codes, groups))
