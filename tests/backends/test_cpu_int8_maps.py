"""Norms, maps and moves of the int8 CPU backend against float64 torch, for each instruction set that runs here.

Pure quantization is bit for bit `tfqc.quantize`. Behind a norm or an activation the value before rounding differs from
float64's by some 1e-6, so a code differs, by one, only where the value is that close to a rounding boundary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.backends.kernels import DTYPES, EVERY_ISA, Guarded, at_end, by_row, quant, run
from tfqc.backends.cpu_int8.runtime import abi
from tfqc.runtime import kernel_ops, ops

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
ACTS = {
    abi.Act.NONE: lambda x: x,
    abi.Act.SILU: F.silu,
    abi.Act.GELU: F.gelu,
    abi.Act.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
T = 5  # rows of the schedule

floats = st.sampled_from([F32, BF16])
outputs = st.sampled_from([F32, BF16, U8])
threads = st.sampled_from([1, 2, 3])
seeds = st.integers(0, 2**31)
widths = st.one_of(st.integers(1, 70), st.sampled_from([320, 1280]))
some = settings(max_examples=25, deadline=None)


def table(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the rows."""
    scale = at_end(torch.rand(T, generator=generator) * 0.05 + 0.002)
    return scale, at_end(torch.randint(0, 256, (T,), generator=generator, dtype=torch.int32))


def rows_for(batch: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, T, (batch,), generator=generator).tolist()


def codes_of(x: Tensor, scale: Tensor, zero: Tensor, rows: list[int]) -> Tensor:
    return ops.quantize(x, scale.to(x.dtype), zero, torch.tensor(rows), 0, 255)


def assert_stored(
    got: Tensor, exact: Tensor, scale: Tensor, zero: Tensor, rows: list[int], error: float = 3e-6
) -> None:
    """`exact` is float64; `error` is what f32 may differ by, beside 1e-6 of the value."""
    if got.dtype == U8:
        off = error + 1e-6 * exact.abs()
        low, high = (codes_of(exact + by, scale.double(), zero, rows) for by in (-off, off))
        assert ((low <= got) & (got <= high)).all()
    else:
        torch.testing.assert_close(got.double(), exact, rtol=2**-8 if got.dtype == BF16 else 1e-6, atol=error)


def normed(
    isa: str, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, out: torch.dtype, act: int,
    scale: Tensor, zero: Tensor, rows: list[int], team: int,
) -> Tensor:  # fmt: skip
    batch, seq, c = x.shape
    to, x = Guarded((batch, seq, c), out), at_end(x)
    args = abi.NormArgs(
        x.data_ptr(), to.pointer, batch, seq, c, groups, by_row(weight), by_row(bias), 1e-5, DTYPES[x.dtype],
        DTYPES[out], act, quant(scale, zero),
    )  # fmt: skip
    run(isa, "norm", args, rows, team, 24 * -(-c // 16) * 16 if groups else 0, 32 * groups * team)
    return to.tensor


def check_norm(
    isa: str, seed: int, x: Tensor, groups: int, affine: bool, out: torch.dtype, act: abi.Act, team: int
) -> None:
    """Against float64. The kernel rounds mean / deviation to f32, which is what it may be off by."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq, c = x.shape
    weight, bias = (at_end(torch.randn(T, c, generator=generator)) if affine else None for _ in range(2))
    scale, zero = table(generator)
    rows = rows_for(batch, generator)

    grouped = x.double().reshape(batch, seq, groups or 1, -1)
    over = (1, 3) if groups else 3
    mean = grouped.mean(over, keepdim=True)
    rstd = (grouped.var(over, correction=0, keepdim=True) + 1e-5).rsqrt()
    exact = ((grouped - mean) * rstd).reshape(x.shape)
    error = 3e-6 + 2**-22 * float((mean * rstd).abs().amax()) * (1 if weight is None else float(weight.abs().amax()))
    exact = exact if weight is None else exact * weight.double()[rows][:, None]
    exact = exact if bias is None else exact + bias.double()[rows][:, None]

    got = normed(isa, x, groups, weight, bias, out, act, scale, zero, rows, team)
    assert_stored(got, ACTS[act](exact), scale, zero, rows, error)


@EVERY_ISA
class TestNorm:
    @given(
        seeds, st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 33), st.booleans(), floats,
        outputs, st.sampled_from(list(ACTS)), threads,
    )  # fmt: skip
    @some
    def test_group_norm(
        self, isa: str, seed: int, batch: int, seq: int, groups: int, size: int, affine: bool, dtype: torch.dtype,
        out: torch.dtype, act: abi.Act, team: int,
    ) -> None:  # fmt: skip
        x = torch.randn(batch, seq, groups * size, generator=torch.Generator().manual_seed(seed)) * 3 + 1
        check_norm(isa, seed, x.to(dtype), groups, affine, out, act, team)

    @given(
        seeds, st.integers(1, 3), st.integers(1, 9), widths, st.booleans(), floats, outputs,
        st.sampled_from(list(ACTS)), threads,
    )  # fmt: skip
    @some
    def test_layer_norm(
        self, isa: str, seed: int, batch: int, seq: int, c: int, affine: bool, dtype: torch.dtype, out: torch.dtype,
        act: abi.Act, team: int,
    ) -> None:  # fmt: skip
        x = torch.randn(batch, seq, c, generator=torch.Generator().manual_seed(seed)) * 3 + 1
        check_norm(isa, seed, x.to(dtype), 0, affine, out, act, team)

    @pytest.mark.parametrize("groups", [0, 1, 32])
    @pytest.mark.parametrize("mean, std", [(100, 1), (-3000, 0.5), (0, 1e-4), (1e4, 30)])
    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_far_from_zero(self, isa: str, groups: int, mean: float, std: float, dtype: torch.dtype) -> None:
        x = torch.randn(2, 67, 96, generator=torch.Generator().manual_seed(3)) * std + mean
        check_norm(isa, 3, x.to(dtype), groups, False, F32, abi.Act.NONE, 2)

    @pytest.mark.parametrize("groups", [1, 4])
    def test_one_outlier(self, isa: str, groups: int) -> None:
        x = torch.randn(1, 600, 64, generator=torch.Generator().manual_seed(3))
        x[0, 0] = 1e4
        check_norm(isa, 3, x, groups, False, F32, abi.Act.NONE, 2)

    @pytest.mark.parametrize("groups", [0, 4])
    def test_nothing_varies(self, isa: str, groups: int) -> None:
        check_norm(isa, 3, torch.full((1, 8, 24), 7.3), groups, False, F32, abi.Act.SILU, 2)

    def test_threads_change_only_rounding(self, isa: str) -> None:
        """The sums of a group are added in another order, in double: outputs differ by an f32 rounding at most."""
        x = torch.randn(2, 61, 40, generator=torch.Generator().manual_seed(5)) + 4
        scale, zero, rows = *table(torch.Generator()), [0, 3]
        one, *others = (normed(isa, x, 4, None, None, F32, 0, scale, zero, rows, n) for n in (1, 2, 3, 8))
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("groups", [0, 5])
    def test_fused_is_the_composition(self, isa: str, groups: int) -> None:
        """Norm, activation and codes in one go are the three one after the other, bit for bit."""
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(3, 21, 50, generator=generator)
        weight, bias = torch.randn(2, T, 50, generator=generator)
        scale, zero, rows = *table(generator), [4, 0, 2]
        fused = normed(isa, x, groups, weight, bias, U8, abi.Act.SILU, scale, zero, rows, 2)
        plain = normed(isa, x, groups, weight, bias, F32, abi.Act.NONE, scale, zero, rows, 2)
        active = mapped(isa, plain, F32, abi.Act.SILU, scale, zero, rows, 1)
        assert fused.equal(mapped(isa, active, U8, abi.Act.NONE, scale, zero, rows, 1))


def mapped(
    isa: str, x: Tensor, out: torch.dtype, act: int, scale: Tensor, zero: Tensor, rows: list[int], team: int
) -> Tensor:
    """x [B, S, C] may be a slice of wider tokens."""
    batch, seq, c = x.shape
    c = c // 2 if act == abi.Act.GEGLU else c
    to, x = Guarded((batch, seq, c), out), at_end(x)
    args = abi.MapArgs(
        x.data_ptr(), to.pointer, batch, seq, c, x.stride(1), DTYPES[x.dtype], DTYPES[out], act, 0, quant(scale, zero)
    )
    run(isa, "map", args, rows, team)
    return to.tensor


EXTREMES = [0.0, -0.0, 1e-45, -1e-38, 3.4e38, -3.4e38, float("inf"), -float("inf"), float("nan")]


@EVERY_ISA
class TestMap:
    @given(seeds, st.integers(1, 3), st.integers(1, 9), widths, st.integers(0, 9), floats, threads)
    @some
    def test_quantize_is_exact(
        self, isa: str, seed: int, batch: int, seq: int, c: int, beside: int, dtype: torch.dtype, team: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale, zero = table(generator)
        rows = rows_for(batch, generator)
        wide = torch.randn(batch, seq, c + beside, generator=generator).to(dtype)
        x = wide[..., :c]
        codes = mapped(isa, x, U8, abi.Act.NONE, scale, zero, rows, team)
        assert codes.equal(codes_of(x.float(), scale, zero, rows))

    def test_scale_of_each_token(self, isa: str) -> None:
        generator = torch.Generator().manual_seed(4)
        x, to = torch.randn(2, 7, 20, generator=generator), Guarded((2, 7, 20), U8)
        scale = torch.rand(2, 7, generator=generator) * 0.1
        zero = torch.randint(0, 256, (2, 7), generator=generator, dtype=torch.int32)
        each = abi.Quant(abi.Rows(scale.data_ptr(), 0, 7, 1), abi.Rows(zero.data_ptr(), 0, 7, 1))
        run(isa, "map", abi.MapArgs(x.data_ptr(), to.pointer, 2, 7, 20, 20, 0, abi.DType.U8, 0, 0, each), threads=2)
        expected = codes_of(x.reshape(14, 20), scale.flatten(), zero.flatten(), list(range(14)))
        assert to.tensor.reshape(14, 20).equal(expected)

    @pytest.mark.parametrize("step", [1.0, 0.1, 1e-30, 1e30])
    def test_quantize_ties_and_extremes(self, isa: str, step: float) -> None:
        """A NaN becomes code 0, which is what torch's conversion gives on x86; infinities the ends of the range."""
        ties = [(k + 0.5) * step for k in range(-300, 300)]
        x = torch.tensor([*ties, *EXTREMES]).reshape(1, 1, -1)
        scale, zero = torch.full((T,), step), torch.tensor([0, 3, 128, 254, 255], dtype=torch.int32)
        for row in range(T):
            codes = mapped(isa, x, U8, abi.Act.NONE, scale, zero, [row], 1)
            assert codes[..., :-1].equal(codes_of(x, scale, zero, [row])[..., :-1])
            assert codes[0, 0, -1] == 0

    @given(
        seeds, st.integers(1, 3), st.integers(1, 9), widths, floats, outputs,
        st.sampled_from([*ACTS, abi.Act.GEGLU]), threads,
    )  # fmt: skip
    @some
    def test_activations(
        self, isa: str, seed: int, batch: int, seq: int, c: int, dtype: torch.dtype, out: torch.dtype, act: abi.Act,
        team: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        scale, zero = table(generator)
        rows = rows_for(batch, generator)
        gated = act == abi.Act.GEGLU
        x = (torch.randn(batch, seq, 2 * c if gated else c, generator=generator) * 3).to(dtype)
        got = mapped(isa, x, out, act, scale, zero, rows, team)
        value, *gate = x.double().chunk(2 if gated else 1, -1)
        assert_stored(got, value * F.gelu(gate[0]) if gated else ACTS[act](value), scale, zero, rows)
        assert got.equal(mapped(isa, x, out, act, scale, zero, rows, 1))

    @pytest.mark.parametrize("act", [abi.Act.SILU, abi.Act.GELU, abi.Act.GELU_TANH, abi.Act.GEGLU])
    def test_fused_is_the_composition(self, isa: str, act: abi.Act) -> None:
        generator = torch.Generator().manual_seed(1)
        scale, zero, rows = *table(generator), [2, 1]
        x = torch.randn(2, 17, 90, generator=generator) * 3
        fused = mapped(isa, x, U8, act, scale, zero, rows, 3)
        assert fused.equal(mapped(isa, mapped(isa, x, F32, act, scale, zero, rows, 1), U8, 0, scale, zero, rows, 1))

    def test_far_ends_of_activations(self, isa: str) -> None:
        x = torch.tensor([-1e30, -1e4, -88.8, -87.2, -20, -0.0, 0.0, 20, 87.2, 88.8, 1e4, 1e30]).reshape(1, 1, -1)
        for act, reference in ACTS.items():
            got = mapped(isa, x, F32, act, *table(torch.Generator()), [0], 1)
            torch.testing.assert_close(got.double(), reference(x.double()), rtol=1e-6, atol=1e-6)


def tokens_quantized(isa: str, x: Tensor, team: int) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, c), x = x.shape, at_end(x)
    to, scale, zero = Guarded((tokens, c), U8), Guarded((tokens,), F32), Guarded((tokens,), torch.int32)
    args = abi.TokenQuantizeArgs(
        x.data_ptr(), to.pointer, scale.pointer, zero.pointer, tokens, c, DTYPES[x.dtype], 0
    )  # fmt: skip
    run(isa, "quantize_tokens", args, threads=team)
    return to.tensor, scale.tensor, zero.tensor


@EVERY_ISA
class TestTokens:
    @given(
        seeds, st.integers(1, 9), widths, floats, threads, st.sampled_from([0, 1e-9, 1e-3, 1, 1e5, 1e30]),
        st.sampled_from([-3, 0, 3]),
    )  # fmt: skip
    @some
    @example(0, 3, 16, F32, 1, 0, 0)
    def test_is_quantize_dynamic(
        self, isa: str, seed: int, tokens: int, c: int, dtype: torch.dtype, team: int, size: float, mean: float
    ) -> None:
        x = ((torch.randn(tokens, c, generator=torch.Generator().manual_seed(seed)) + mean) * size).to(dtype)
        codes, scale, zero = tokens_quantized(isa, x, team)
        x = x.float()
        assert ((codes.float() - zero[:, None]) * scale[:, None]).equal(ops.quantize_dynamic(x, 8))
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        exact = ((high - low) / 255).clamp(min=torch.finfo(F32).eps)
        assert scale.equal(exact) and zero.equal(torch.round(-low / exact).int())

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, isa: str, value: float) -> None:
        """All that is made of such a token is NaN, of the others nothing is."""
        x = torch.linspace(-1, 2, 40).repeat(2, 1)
        x[1, 5] = value
        codes, scale, zero = tokens_quantized(isa, x, 1)
        wanted = kernel_ops.quantize_tokens(x)
        assert codes.equal(wanted[0]) and zero.equal(wanted[2])
        assert scale[0] == wanted[1][0] and scale[1].isnan() and wanted[1][1].isnan()
        assert not codes[1].any() and zero[1] == 0


@EVERY_ISA
class TestAdd:
    @given(
        seeds, st.integers(1, 3), st.integers(1, 9), widths, st.sampled_from([F32, BF16, U8]),
        st.sampled_from([None, F32, BF16, U8]), st.booleans(), st.tuples(st.booleans(), st.booleans()), outputs,
        threads,
    )  # fmt: skip
    @some
    def test_add(
        self, isa: str, seed: int, batch: int, seq: int, c: int, dtype: torch.dtype, dtype_b: torch.dtype | None,
        gated: bool, repeat: tuple[bool, bool], out: torch.dtype, team: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        scale, zero = table(generator)
        rows = rows_for(batch, generator)

        def operand(kind: torch.dtype, repeated: bool) -> Tensor:
            values = torch.randn(1 if repeated else batch, seq, c, generator=generator) * 4 + 8
            return at_end(values.clamp(min=0).to(kind))

        a, b = operand(dtype, repeat[0]), None if dtype_b is None else operand(dtype_b, repeat[1])
        gate = at_end(torch.randn(T, c, generator=generator)) if gated else None
        got = added(isa, a, b, gate, out, scale, zero, rows, team)
        exact = a.double() * (gate.double()[rows][:, None] if gate is not None else 1)
        exact = (exact if b is None else exact + b.double()).expand(batch, -1, -1)
        assert_stored(got, exact, scale, zero, rows)
        assert got.equal(added(isa, a, b, gate, out, scale, zero, rows, 1))

    def test_sum_to_codes_is_exact(self, isa: str) -> None:
        generator = torch.Generator().manual_seed(2)
        scale, zero, rows = *table(generator), [3, 1]
        a, b = torch.randn(2, 2, 31, 50, generator=generator)
        assert added(isa, a, b, None, U8, scale, zero, rows, 2).equal(codes_of(a + b, scale, zero, rows))


def added(
    isa: str, a: Tensor, b: Tensor | None, gate: Tensor | None, out: torch.dtype, scale: Tensor, zero: Tensor,
    rows: list[int], team: int,
) -> Tensor:  # fmt: skip
    _, seq, c = a.shape
    to = Guarded((len(rows), seq, c), out)

    def stride(x: Tensor | None) -> int:
        return 0 if x is None or len(x) == 1 else seq * c

    args = abi.AddArgs(
        a.data_ptr(), 0 if b is None else b.data_ptr(), to.pointer, len(rows), seq, c, stride(a), stride(b),
        by_row(gate), DTYPES[a.dtype], 0 if b is None else DTYPES[b.dtype], DTYPES[out], 0, quant(scale, zero),
    )  # fmt: skip
    run(isa, "add", args, rows, team)
    return to.tensor


def moved(isa: str, kernel: str, args: Any, to: Guarded, team: int) -> Tensor:
    run(isa, kernel, args, threads=team)
    return to.tensor


@EVERY_ISA
class TestMoves:
    @given(
        seeds, st.integers(1, 12), widths, widths,
        st.sampled_from([(F32, F32, F32), (BF16, BF16, BF16), (U8, U8, U8), (F32, BF16, F32), (F32, BF16, BF16)]),
        threads,
    )  # fmt: skip
    @some
    def test_concat(
        self, isa: str, seed: int, tokens: int, c: int, c2: int,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], team: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        a, b = (
            at_end((torch.randn(tokens, n, generator=generator) * 9).clamp(min=0).to(dtype))
            for n, dtype in zip((c, c2), dtypes, strict=False)
        )
        to = Guarded((tokens, c + c2), dtypes[2])
        args = abi.ConcatArgs(
            a.data_ptr(), b.data_ptr(), to.pointer, tokens, c, c2, *(DTYPES[d] for d in dtypes), 0
        )  # fmt: skip
        assert moved(isa, "concat", args, to, team).equal(torch.cat([a.to(dtypes[2]), b.to(dtypes[2])], 1))

    @given(
        seeds, st.integers(1, 2), st.integers(1, 6), st.integers(1, 6), st.integers(1, 70), st.integers(1, 4), threads
    )
    @some
    def test_upsample(
        self, isa: str, seed: int, batch: int, h: int, w: int, pixel: int, factor: int, team: int
    ) -> None:
        x = at_end(torch.randint(0, 256, (batch, h, w, pixel), generator=torch.Generator().manual_seed(seed), dtype=U8))
        to = Guarded((batch, h * factor, w * factor, pixel), U8)
        args = abi.UpsampleArgs(x.data_ptr(), to.pointer, batch, h, w, pixel, factor)
        expected = x.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        assert moved(isa, "upsample", args, to, team).equal(expected)
