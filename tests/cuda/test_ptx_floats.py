"""Floating point instructions: bit for bit one rounding, against fractions; conversions at the ends of their ranges."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.errors import PtxError
from tests.ptx.snippet import compute

RANDOM = np.random.default_rng(1)
F16, F32, F64 = np.float16, np.float32, np.float64
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]


def floats(dtype: type[np.floating], count: int = 512) -> np.ndarray:
    """Any bits at all, special values, and numbers around 1, whose sums cancel."""
    info = np.finfo(dtype)
    bits = RANDOM.integers(0, 2**info.bits, count, dtype=f"u{info.bits // 8}").view(dtype)
    edges = [*SPECIAL, info.max, info.smallest_normal, info.smallest_subnormal, 1 + info.eps, -1 - info.eps]
    bits[: count // 4] = RANDOM.choice(np.array(edges, dtype), count // 4)
    bits[count // 4 : count // 2] = 1 + RANDOM.integers(-8, 9, count // 4).astype(dtype) * info.eps
    return RANDOM.permutation(bits)


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bits; any NaN is as good as another."""
    nan = np.isnan(expected)
    unsigned = f"u{got.itemsize}"
    return bool((np.isnan(got) == nan).all() and (got.view(unsigned) == expected.view(unsigned))[~nan].all())


def nearest(exact: Fraction, dtype: type[np.floating]) -> np.floating:
    """A rational number rounded once, to even."""
    info = np.finfo(dtype)
    if exact == 0:
        return dtype(0)
    exponent = abs(exact).numerator.bit_length() - abs(exact).denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, info.minexp) - info.nmant)
    rounded = round(exact / unit) * unit  # to even
    sign = -1 if exact < 0 else 1
    if abs(rounded) > Fraction(float(info.max)):
        return dtype(sign * np.inf)
    return dtype(sign * float(abs(rounded)))


@pytest.mark.parametrize(("kind", "dtype"), [("f32", F32), ("f16", F16)])
def test_fma_rounds_once(kind: str, dtype: type[np.floating]) -> None:
    a, b, c = (floats(dtype) for _ in range(3))
    half = a.size // 2
    with np.errstate(all="ignore"):
        c[:half] = (-a[:half].astype(F64) * b[:half]).astype(dtype)  # cancels but for the rounding of the product
        expected = (a.astype(F64) * b + c).astype(dtype)  # right where it is zero or not finite
    got = compute(f"fma.rn.{kind} %d, %a, %b, %c;", dtype, a=a, b=b, c=c)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    for i in np.flatnonzero(finite):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            expected[i] = nearest(exact, dtype)
    assert same(got, expected)


def test_fma_beside_a_tie() -> None:
    """(1 + 2^-12)^2 lies in the middle of two float32; 2^-80, lost in a float64 sum, decides between them."""
    a = np.full(3, 1 + 2.0**-12, F32)
    c = np.array([2.0**-80, 0, -(2.0**-80)], F32)
    got = compute("fma.rn.f32 %d, %a, %a, %c;", F32, a=a, c=c)
    assert got.tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11, 1 + 2.0**-11]


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize(("kind", "dtype"), [("f32", F32), ("rn.f32", F32), ("f16", F16), ("f64", F64)])
def test_arithmetic_is_that_of_ieee(name: str, kind: str, dtype: type[np.floating]) -> None:
    a, b = floats(dtype), floats(dtype)
    with np.errstate(all="ignore"):
        expected = {"add": a + b, "sub": a - b, "mul": a * b}[name]
    assert same(compute(f"{name}.{kind} %d, %a, %b;", dtype, a=a, b=b), expected)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_directed_roundings(name: str, mode: str) -> None:
    a, b = RANDOM.normal(size=(2, 256)).astype(F32)
    more = {"c": RANDOM.normal(size=256).astype(F32)} if name == "fma" else {}
    got = compute(f"{name}.{mode}.f32 %d, %a, %b{', %c' if more else ''};", F32, a=a, b=b, **more)
    for i, result in enumerate(got):
        x, y = Fraction(float(a[i])), Fraction(float(b[i]))
        exact = x + y if name == "add" else x * y + (Fraction(float(more["c"][i])) if more else 0)
        low = mode == "rm" or (mode == "rz" and exact > 0)
        other = np.nextafter(result, F32(np.inf if low else -np.inf))
        assert (Fraction(float(result)) <= exact) if low else (Fraction(float(result)) >= exact)
        assert (Fraction(float(other)) > exact) if low else (Fraction(float(other)) < exact)


def test_zero_rounded_down_is_negative() -> None:
    one = np.ones(1, F32)
    assert np.signbit(compute("add.rm.f32 %d, %a, %b;", F32, a=one, b=-one))[0]
    assert not np.signbit(compute("add.rm.f32 %d, %a, %b;", F32, a=one * 0, b=one * 0))[0]


def test_flush_of_subnormal_numbers() -> None:
    a = np.array([1e-40, -1e-40, 1e-20, 2.0**-126], F32)
    assert compute("add.ftz.f32 %d, %a, 0f00000000;", F32, a=a).tolist() == [0, 0, a[2], a[3]]
    assert compute("mul.ftz.f32 %d, %a, %a;", F32, a=a).tolist() == [0, 0, 0, 0]
    assert compute("add.f32 %d, %a, 0f00000000;", F32, a=a).tolist() == a.tolist()


def test_clamped_results() -> None:
    a = np.array([-1, 0.5, 3, np.nan, np.inf], F32)
    assert compute("add.sat.f32 %d, %a, 0f00000000;", F32, a=a).tolist() == [0, 0.5, 1, 0, 1]
    assert compute("cvt.sat.f32.f32 %d, %a;", F32, a=a).tolist() == [0, 0.5, 1, 0, 1]
    got = compute("fma.rn.relu.f16 %d, %a, %b, %b;", F16, a=np.array([1, -3], F16), b=np.array([2, 2], F16))
    assert got.tolist() == [4, 0]


def test_minimum_and_maximum_of_nan_and_zeros() -> None:
    nan = np.nan
    a, b = np.array([nan, 1, nan, -0.0, 0.0, 3], F32), np.array([2, nan, nan, 0.0, -0.0, 4], F32)
    least, most = (compute(f"{name}.f32 %d, %a, %b;", F32, a=a, b=b) for name in ("min", "max"))
    assert same(least, np.array([2, 1, nan, -0.0, -0.0, 3], F32))
    assert same(most, np.array([2, 1, nan, 0.0, 0.0, 4], F32))
    assert np.isnan(compute("max.NaN.f32 %d, %a, %b;", F32, a=a, b=b)).tolist() == [True] * 3 + [False] * 3


def test_signs_are_bits() -> None:
    a = np.array([0.0, -0.0, np.nan, -5], F32)
    bits = a.view(np.uint32)
    assert (compute("neg.f32 %d, %a;", np.uint32, a=a) == bits ^ 0x80000000).all()
    assert (compute("abs.f32 %d, %a;", np.uint32, a=a) == bits & 0x7FFFFFFF).all()
    got = compute("copysign.f32 %d, %a, %b;", F32, a=a, b=np.full(4, 2, F32))
    assert got.tolist() == [2, -2, 2, -2]


def test_exact_functions() -> None:
    a, b = floats(F32), floats(F32)
    with np.errstate(all="ignore"):
        assert same(compute("div.rn.f32 %d, %a, %b;", F32, a=a, b=b), a / b)
        assert same(compute("sqrt.rn.f32 %d, %a;", F32, a=a), np.sqrt(a))
        assert same(compute("rcp.rn.f32 %d, %a;", F32, a=a), F32(1) / a)


@pytest.mark.parametrize(
    ("name", "of"),
    [("ex2.approx.ftz", np.exp2), ("lg2.approx", np.log2), ("tanh.approx", np.tanh), ("rcp.approx", np.reciprocal),
     ("rsqrt.approx", lambda x: 1 / np.sqrt(x)), ("sqrt.approx", np.sqrt)],
)  # fmt: skip
def test_approximate_functions(name: str, of: np.ufunc) -> None:
    a = RANDOM.uniform(0.01, 20, 256).astype(F32)
    got = compute(f"{name}.f32 %d, %a;", F32, a=a)
    np.testing.assert_allclose(got, of(a.astype(F64)), rtol=2**-23)


def test_pairs_of_halves() -> None:
    a, b = floats(F16), floats(F16)
    pairs = {"a": a.view(np.uint32), "b": b.view(np.uint32)}
    with np.errstate(all="ignore"):
        assert same(compute("add.f16x2 %d, %a, %b;", np.uint32, **pairs).view(F16), a + b)
        assert same(compute("mul.rn.f16x2 %d, %a, %b;", np.uint32, **pairs).view(F16), a * b)
    got = compute("set.gt.f16x2.f16x2 %d, %a, %b;", np.uint32, **pairs).view(F16)
    assert (got == (a > b)).all()
    got = compute("setp.lt.f16x2 %p|%q, %a, %b; selp.u32 %t0, 1, 0, %p; selp.u32 %t1, 2, 0, %q; or.b32 %d, %t0, %t1;",
                  np.uint32, **pairs)  # fmt: skip
    assert (got == (a < b)[0::2] + 2 * (a < b)[1::2]).all()
    low, high = RANDOM.normal(size=(2, 64)).astype(F32)
    got = compute("cvt.rn.f16x2.f32 %d, %a, %b;", np.uint32, a=high, b=low).view(F16)
    assert (got[0::2] == low.astype(F16)).all()
    assert (got[1::2] == high.astype(F16)).all()


def test_bfloat16() -> None:
    """Of its 8 bits, in float32 products have 16 and sums at most 24 where they do not round."""
    bits = RANDOM.integers(0x3F00, 0x4100, (3, 256)).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(F32)
    exact = wide[0].astype(F64) * wide[1] + wide[2]
    got = compute("fma.rn.bf16 %d, %a, %b, %c;", np.uint16, a=bits[0], b=bits[1], c=bits[2])
    back = (got.astype(np.uint32) << 16).view(F32)
    spacing = np.exp2(np.floor(np.log2(exact)) - 7)
    assert (back == np.round(exact / spacing) * spacing).all()
    a = np.array([1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, np.inf, np.nan], F32)
    got = compute("cvt.rn.bf16.f32 %d, %a;", np.uint16, a=a)
    assert got.tolist() == [0x3F80, 0x3F81, 0x3F82, 0x7F80, 0x7FFF]


def test_to_half_with_one_rounding() -> None:
    a = floats(F32, 1024)
    a[:4] = [65504, 65519.99, 65520, 2**-25]
    with np.errstate(all="ignore"):
        expected = a.astype(F16)
    assert same(compute("cvt.rn.f16.f32 %d, %a;", F16, a=a), expected)
    near = np.array([1 + 2.0**-11 + 2.0**-40], F64)  # to float32 it would be a tie
    assert compute("cvt.rn.f16.f64 %d, %a;", F16, a=near)[0] == F16(1 + 2**-10)
    assert compute("cvt.rz.f16.f32 %d, %a;", F16, a=np.array([1.9999], F32))[0] == F16(2 - 2**-10)
    halves = floats(F16)
    assert same(compute("cvt.f32.f16 %d, %a;", F32, a=halves), halves.astype(F32))


def test_floats_to_integers() -> None:
    a = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, -128.5, 3e9, -3e9, 1e20, np.inf, -np.inf, np.nan], F32)
    top, low = 2**31 - 1, -(2**31)
    edges = [top, low, top, top, low, 0]
    modes = {
        "rni": [0, 2, 2, 0, -2, 128, -128], "rzi": [0, 1, 2, 0, -1, 127, -128],
        "rmi": [0, 1, 2, -1, -2, 127, -129], "rpi": [1, 2, 3, 0, -1, 128, -128],
    }  # fmt: skip
    for mode, expected in modes.items():
        assert compute(f"cvt.{mode}.s32.f32 %d, %a;", np.int32, a=a).tolist() == expected + edges
    assert compute("cvt.rni.s8.f32 %d, %a;", np.int16, a=a)[5:9].tolist() == [127, -128, 127, -128]
    assert compute("cvt.rni.u32.f32 %d, %a;", np.uint32, a=a)[7:].tolist() == [3 * 10**9, 0, 2**32 - 1, 2**32 - 1, 0, 0]
    wide = compute("cvt.rzi.s64.f32 %d, %a;", np.int64, a=a)[7:].tolist()
    assert wide == [int(F32(3e9)), int(F32(-3e9)), 2**63 - 1, 2**63 - 1, -(2**63), -(2**63)]
    assert compute("cvt.rni.f32.f32 %d, %a;", F32, a=a)[:5].tolist() == [0, 2, 2, 0, -2]


def test_integers_to_floats() -> None:
    a = RANDOM.integers(-(2**31), 2**31, 256).astype(np.int32)
    assert (compute("cvt.rn.f32.s32 %d, %a;", F32, a=a) == a.astype(F32)).all()
    down = compute("cvt.rm.f32.s32 %d, %a;", F32, a=a)
    assert (down.astype(F64) <= a).all()
    assert (np.nextafter(down, F32(np.inf)).astype(F64) > a).all()
    small = RANDOM.integers(-9999, 9999, 256).astype(np.int16)
    assert (compute("cvt.rn.f16.s16 %d, %a;", F16, a=small) == small.astype(F16)).all()


def test_comparisons_with_nan() -> None:
    a, b = np.array([1, np.nan, 2, np.nan], F32), np.array([1, 1, 3, np.nan], F32)
    expected = {
        "eq": [1, 0, 0, 0], "equ": [1, 1, 0, 1], "ne": [0, 0, 1, 0], "neu": [0, 1, 1, 1], "lt": [0, 0, 1, 0],
        "ltu": [0, 1, 1, 1], "ge": [1, 0, 0, 0], "geu": [1, 1, 0, 1], "num": [1, 0, 1, 0], "nan": [0, 1, 0, 1],
    }  # fmt: skip
    for name, results in expected.items():
        got = compute(f"setp.{name}.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;", np.uint32, a=a, b=b)
        assert got.tolist() == results, name


@pytest.mark.parametrize("body", ["cvt.s32.f32 %d, %a;", "cvt.rn.f32.f32 %d, %a;", "cvt.f32.s32 %d, %a;",
                                  "rcp.rz.f32 %d, %a;", "fma.rn.f32 %d, %a, %a;", "ex2.f32 %d, %a;"])  # fmt: skip
def test_variants_that_do_not_exist(body: str) -> None:
    with pytest.raises(PtxError):
        compute(body, F32, a=np.ones(1, F32))
