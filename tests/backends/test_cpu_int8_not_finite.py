"""NaN, infinities and huge values in the kernels: every body and torch make the same of them.

In floats they stay what they are. As codes a NaN is 0, what is out of range the nearest end.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.backends.kernels import DTYPES, EVERY_ISA, Guarded, at_end, by_row, quant, run
from tfqc.backends.cpu_int8.runtime import abi
from tfqc.runtime import kernel_ops, tiles

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
NAMES = {F32: "f32", BF16: "bf16", U8: "u8"}
ODD = [math.nan, -math.nan, math.inf, -math.inf]
HUGE = [3.4e38, -3.4e38, 1e20, -1e20, 2.0**31, -(2.0**31), 2.0**32 + 7, 3e9, -3e9, 300.0, -300.0, 88.0, -88.0, 0.0]
SCALE, ZERO = torch.tensor([0.5]), torch.tensor([13], dtype=torch.int32)
EVERY_OUT = pytest.mark.parametrize("out", [F32, BF16, U8])


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, but that any NaN is as good as another."""
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def mapped(isa: str, x: Tensor, act: abi.Act, out: torch.dtype) -> Tensor:
    """x [C], or with GEGLU [2 C], as one token."""
    c = len(x) // 2 if act == abi.Act.GEGLU else len(x)
    x, to = at_end(x), Guarded((c,), out)
    args = abi.MapArgs(
        x.data_ptr(), to.pointer, 1, 1, c, len(x), DTYPES[x.dtype], DTYPES[out], act, 0, quant(SCALE, ZERO)
    )
    run(isa, "map", args)
    return to.tensor


@EVERY_ISA
@EVERY_OUT
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_values_as_they_are(isa: str, out: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.tensor([*ODD, *HUGE] * 3).to(dtype)  # whole vectors and a part of one
    assert_same(mapped(isa, x, abi.Act.NONE, out), kernel_ops.map(x[None], "none", None, SCALE, ZERO, NAMES[out])[0])


@EVERY_ISA
def test_a_float_becomes_the_nearest_bf16(isa: str) -> None:
    """Ties to even, beyond the largest an infinity, and a NaN stays one, whatever its bits are."""
    bits = [0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800001, 0x7FFFFFFF, 0x7F807FFF, 0x3F808000, 0x3F818000, 0x3F808001]
    x = torch.tensor(bits + [b - 2**31 for b in bits], dtype=torch.int64).to(torch.int32).view(F32)
    assert_same(mapped(isa, x, abi.Act.NONE, BF16), x.to(BF16))


@EVERY_ISA
@EVERY_OUT
@pytest.mark.parametrize("act", [abi.Act.SILU, abi.Act.GELU, abi.Act.GELU_TANH])
def test_behind_an_activation(isa: str, out: torch.dtype, act: abi.Act) -> None:
    """Its limit at an infinity: torch has inf * 0 there."""
    x = torch.tensor([*ODD, *HUGE] * 3)
    want = kernel_ops.map(limit(x, act.name.lower())[None], "none", None, SCALE, ZERO, NAMES[out])[0]
    got = mapped(isa, x, act, out)
    if out == U8:
        assert_same(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30, equal_nan=True)


@EVERY_ISA
def test_geglu(isa: str) -> None:
    value, gate = (torch.tensor(x) for x in ([1, 2, math.nan, 3, math.inf, 1.0], [math.nan, math.inf, 1, -1e30, 1, 20]))
    got = mapped(isa, torch.cat([value, gate]), abi.Act.GEGLU, F32)
    want = torch.tensor([math.nan, math.inf, math.nan, 0, math.inf, 20])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30, equal_nan=True)


@EVERY_ISA
@EVERY_OUT
@pytest.mark.parametrize("act", ["none", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("k, n", [(64, 64), (7, 32)])
def test_behind_a_product(isa: str, out: torch.dtype, act: str, k: int, n: int) -> None:
    """What is not finite comes with the scale of a token, a bias, a gate or a residual."""
    random = torch.Generator().manual_seed(0)
    tokens = 9
    x = at_end(torch.randint(0, 256, (tokens, k), generator=random, dtype=U8))
    codes = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
    scale, zero = torch.full((tokens,), 0.01), torch.full((tokens,), 7, dtype=torch.int32)
    scale[2], scale[5], scale[8] = math.nan, math.inf, 1e30
    weight_scale = torch.full((n,), 0.02)
    bias, gate, residual = torch.zeros(n), torch.ones(n), torch.zeros(tokens, n)
    bias[3], bias[4], bias[5], gate[6] = math.nan, math.inf, 3.4e38, math.nan
    residual[0, 8], residual[1, 9], residual[1, 10] = math.nan, math.inf, -math.inf
    to = Guarded((tokens, n), out)
    packed, sums = at_end(tiles.pack(codes)), at_end(tiles.sums(codes))
    scales = at_end(tiles.columns(weight_scale))
    args = abi.LinearArgs(
        x=x.data_ptr(), ldx=k, batch=1, seq=tokens, k=k, n=n,
        quant=abi.Quant(*(abi.Rows(t.data_ptr(), 0, tokens, 1) for t in (scale, zero))), weight=packed.data_ptr(),
        weight_scale=scales.data_ptr(), weight_sum=sums.data_ptr(),
        epilogue=abi.Epilogue(
            bias=by_row(bias[None]), gate=by_row(gate[None]), residual=residual.data_ptr(), out=to.pointer,
            residual_ld=n, out_ld=n, residual_dtype=abi.DType.F32, out_dtype=DTYPES[out],
            act=abi.Act[act.upper()], quant=quant(SCALE, ZERO),
        ),
    )  # fmt: skip
    run(isa, "linear", args, [0], 2, 4 << 20)
    nothing = (None,) * 5
    y = kernel_ops.qlinear(
        x[None], scale[None], zero[None], None, codes, weight_scale, bias, "none", *nothing, "f32"
    )[0]  # fmt: skip
    want = (limit(y, act) * gate + residual)[None]
    if out == U8:
        off = [kernel_ops.quantize(want + by, SCALE, ZERO, None, 0, 255)[0] for by in (-1e-3, 1e-3)]
        assert ((off[0] <= to.tensor) & (to.tensor <= off[1])).all()
    else:
        near = {"rtol": 2**-7 if out == BF16 else 1e-5, "atol": 1e-5}
        torch.testing.assert_close(to.tensor.double(), want[0].to(out).double(), **near, equal_nan=True)


@EVERY_ISA
def test_geglu_behind_a_product(isa: str) -> None:
    """A NaN of a value or of its gate is one of the output's."""
    n, width = 64, 32
    x, codes = torch.full((5, 8), 3, dtype=U8), torch.ones(n, 8, dtype=torch.int8)
    bias = torch.zeros(n)
    bias[3] = bias[width + 9] = math.nan
    kept = [tiles.pack(codes, 1, True), tiles.sums(codes, 1, True), torch.ones(n), tiles.columns(bias, 1, True)]
    packed, sums, ones, in_columns = (at_end(t) for t in kept)
    to = Guarded((5, width), F32)
    args = abi.LinearArgs(
        x=(x := at_end(x)).data_ptr(), ldx=8, batch=1, seq=5, k=8, n=n, quant=quant(SCALE, ZERO),
        weight=packed.data_ptr(), weight_scale=ones.data_ptr(), weight_sum=sums.data_ptr(),
        epilogue=abi.Epilogue(bias=by_row(in_columns[None]), out=to.pointer, out_ld=width, act=abi.Act.GEGLU),
    )  # fmt: skip
    run(isa, "linear", args, [0], 1, 4 << 20)
    assert to.tensor.isnan().any(0).nonzero().flatten().tolist() == [3, 9]


def limit(x: Tensor, act: str) -> Tensor:
    """The activation, and at infinities its limit, where torch has inf * 0."""
    exact = kernel_ops.activate(x.double(), act).float()
    return exact if act == "none" else torch.where(x == math.inf, x, torch.where(x == -math.inf, 0, exact))
