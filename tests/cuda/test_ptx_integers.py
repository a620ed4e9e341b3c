"""Integer instructions against Python's integers, on extremes and on random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ptx.errors import PtxError
from tests.ptx.snippet import compute

RANDOM = np.random.default_rng(0)
TYPES = {"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}


def numbers(dtype: type[np.integer], count: int = 256) -> np.ndarray:
    """Extremes and random numbers of a type, in a random order."""
    limits = np.iinfo(dtype)
    edges = [limits.min, limits.max, 0, 1, limits.max - 1, limits.min + 1, 7, limits.max // 2]
    edges += [-1, -2] if limits.min < 0 else [limits.max >> 1]
    random = RANDOM.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    random[: count // 2] = RANDOM.choice(np.array(edges, dtype), count // 2)
    return RANDOM.permutation(random)


def wrap(value: int, dtype: type[np.integer]) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value %= 1 << bits
    return value - (1 << bits) if np.iinfo(dtype).min < 0 and value >> bits - 1 else value


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int, int], int]] = {  # the last argument is the width in bits
    "add": lambda a, b, _: a + b,
    "sub": lambda a, b, _: a - b,
    "mul.lo": lambda a, b, _: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "min": lambda a, b, _: min(a, b),
    "max": lambda a, b, _: max(a, b),
    "div": lambda a, b, _: truncated(a, b),
    "rem": lambda a, b, _: a - b * truncated(a, b),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, kind: str) -> None:
    dtype = TYPES[kind]
    a, b = numbers(dtype), numbers(dtype)
    if name in ("div", "rem"):
        b[b == 0] = 1
    got = compute(f"{name}.{kind} %d, %a, %b;", dtype, a=a, b=b)
    bits = 8 * np.dtype(dtype).itemsize
    assert got.tolist() == [wrap(BINARY[name](x, y, bits), dtype) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind: str) -> None:
    dtype, wide = TYPES[kind], TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
    a, b, c = numbers(dtype), numbers(dtype), numbers(wide)
    got = compute(f"mul.wide.{kind} %d, %a, %b;", wide, a=a, b=b)
    assert got.tolist() == [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    got = compute(f"mad.wide.{kind} %d, %a, %b, %c;", wide, a=a, b=b, c=c)
    assert got.tolist() == [wrap(int(x) * int(y) + int(z), wide) for x, y, z in zip(a, b, c, strict=True)]


def test_unary() -> None:
    a = numbers(np.int32)
    whole = [x % 2**32 for x in a.tolist()]
    assert compute("neg.s32 %d, %a;", np.int32, a=a).tolist() == [wrap(-x, np.int32) for x in a.tolist()]
    assert compute("abs.s32 %d, %a;", np.int32, a=a).tolist() == [wrap(abs(x), np.int32) for x in a.tolist()]
    assert compute("not.b32 %d, %a;", np.int32, a=a).tolist() == [~x for x in a.tolist()]
    assert compute("popc.b32 %d, %a;", np.uint32, a=a).tolist() == [x.bit_count() for x in whole]
    assert compute("clz.b32 %d, %a;", np.uint32, a=a).tolist() == [32 - x.bit_length() for x in whole]
    assert compute("brev.b32 %d, %a;", np.uint32, a=a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in whole]
    found = [(x if x >= 0 else ~x).bit_length() - 1 for x in a.tolist()]
    assert compute("bfind.s32 %d, %a;", np.int32, a=a).tolist() == found
    b = numbers(np.uint64)
    assert compute("clz.b64 %d, %b;", np.uint32, b=b).tolist() == [64 - x.bit_length() for x in b.tolist()]


def test_saturating_addition() -> None:
    a, b = numbers(np.int32), numbers(np.int32)
    got = compute("add.sat.s32 %d, %a, %b;", np.int32, a=a, b=b)
    assert got.tolist() == np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1).tolist()


@pytest.mark.parametrize(("kind", "width"), [("b32", 32), ("s32", 32), ("b64", 64), ("s64", 64), ("b16", 16)])
def test_shifts_beyond_the_width(kind: str, width: int) -> None:
    dtype = {16: np.uint16, 32: np.int32, 64: np.int64}[width]
    a = numbers(dtype)
    amount = RANDOM.choice(np.array([0, 1, 5, width - 1, width, width + 1, 200, 2**32 - 1], np.uint32), a.size)
    signed = kind[0] == "s"
    right = compute(f"shr.{kind} %d, %a, %b;", dtype, a=a, b=amount)
    for x, n, got in zip(a.tolist(), amount.tolist(), right.tolist(), strict=True):
        assert got == wrap((x if signed else x % (1 << width)) >> min(n, 200), dtype)
    left = compute(f"shl.b{width} %d, %a, %b;", dtype, a=a, b=amount)
    assert left.tolist() == [wrap(x << min(n, 200), dtype) for x, n in zip(a.tolist(), amount.tolist(), strict=True)]


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode: str) -> None:
    a, b = numbers(np.uint32), numbers(np.uint32)
    n = RANDOM.integers(0, 70, a.size, dtype=np.uint32)
    left = compute(f"shf.l.{mode}.b32 %d, %a, %b, %n;", np.uint32, a=a, b=b, n=n)
    right = compute(f"shf.r.{mode}.b32 %d, %a, %b, %n;", np.uint32, a=a, b=b, n=n)
    for low, high, by, got_left, got_right in zip(*(x.tolist() for x in (a, b, n, left, right)), strict=True):
        by = by % 32 if mode == "wrap" else min(by, 32)
        both = high << 32 | low
        assert got_left == (both << by >> 32) % 2**32
        assert got_right == (both >> by) % 2**32


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xC0, 0x1B, 0])
def test_lop3(table: int) -> None:
    a, b, c = (numbers(np.uint32, 64) for _ in range(3))
    got = compute(f"lop3.b32 %d, %a, %b, %c, {table};", np.uint32, a=a, b=b, c=c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        bits = [table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1 for i in range(32)]
        assert result == sum(bit << i for i, bit in enumerate(bits))


def test_prmt_picks_bytes_and_their_signs() -> None:
    a, b = np.array([0x83828100], np.uint32), np.array([0x77665544], np.uint32)
    picks = {"0x3210": 0x83828100, "0x7654": 0x77665544, "0x5410": 0x55448100, "0x8888": 0, "0xFB9C": 0x00FFFF00}
    for selector, expected in picks.items():
        assert hex(compute(f"prmt.b32 %d, %a, %b, {selector};", np.uint32, a=a, b=b)[0]) == hex(expected)
    modes = {"f4e": 0x44838281, "rc8": 0x81818181, "rc16": 0x83828382, "b4e": 0x66770081}
    for mode, expected in modes.items():
        assert hex(compute(f"prmt.b32.{mode} %d, %a, %b, 1;", np.uint32, a=a, b=b)[0]) == hex(expected)


def field(value: int, position: int, length: int, signed: bool, bits: int = 32) -> int:
    """bfe, bit by bit as the ISA says it."""
    a = [value >> i & 1 for i in range(bits)]
    sign = 0 if not signed or length == 0 else a[min(position + length - 1, bits - 1)]
    return sum((a[position + i] if i < length and position + i < bits else sign) << i for i in range(bits))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bit_fields(kind: str) -> None:
    a, b = numbers(np.uint32), numbers(np.uint32)
    at = RANDOM.choice(np.array([0, 1, 4, 28, 31, 32, 40, 255], np.uint32), a.size)
    length = RANDOM.choice(np.array([0, 1, 4, 8, 31, 32, 33, 255], np.uint32), a.size)
    got = compute(f"bfe.{kind} %d, %a, %p_, %l;", np.uint32, a=a, p_=at, l=length)
    inserted = compute("bfi.b32 %d, %a, %b, %p_, %l;", np.uint32, a=a, b=b, p_=at, l=length)
    for x, y, p, n, extracted, both in zip(*(v.tolist() for v in (a, b, at, length, got, inserted)), strict=True):
        assert extracted == field(x, p, n, kind == "s32")
        mask = ((1 << n) - 1 << p) % 2**32
        assert both == (y & ~mask | x << p & mask)


def test_sign_extension_of_low_bits() -> None:
    a = numbers(np.int32)
    assert compute("szext.wrap.s32 %d, %a, 4;", np.int32, a=a).tolist() == [((x & 15) ^ 8) - 8 for x in a.tolist()]


def test_dot_product_of_bytes() -> None:
    a, b, c = numbers(np.uint32), numbers(np.uint32), numbers(np.int32)
    got = compute("dp4a.s32.u32 %d, %a, %b, %c;", np.int32, a=a, b=b, c=c)
    x, y = a.view(np.int8).reshape(-1, 4).astype(np.int64), b.view(np.uint8).reshape(-1, 4).astype(np.int64)
    assert got.tolist() == [wrap(v, np.int32) for v in ((x * y).sum(1) + c).tolist()]


@pytest.mark.parametrize(("kind", "low", "high", "bits"), [("s8", -128, 127, 8), ("u8", 0, 255, 8), ("s4", -8, 7, 4)])
def test_packing_with_saturation(kind: str, low: int, high: int, bits: int) -> None:
    a, b, c = numbers(np.int32), numbers(np.int32), numbers(np.uint32)
    a[:64], b[:64] = RANDOM.integers(-10, 10, (2, 64))
    got = compute(f"cvt.pack.sat.{kind}.s32.b32 %d, %a, %b, %c;", np.uint32, a=a, b=b, c=c)
    mask = (1 << bits) - 1
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        upper, lower = (min(max(v, low), high) & mask for v in (x, y))
        assert result == (z << 2 * bits | upper << bits | lower) % 2**32


def test_comparisons_and_selection() -> None:
    a, b = numbers(np.uint32), numbers(np.uint32)
    signed_a, signed_b = a.view(np.int32), b.view(np.int32)
    for mods, expected in {
        "lt.s32": signed_a < signed_b, "lt.u32": a < b, "hs.u32": a >= b, "ne.b32": a != b,
        "ge.s32": signed_a >= signed_b,
    }.items():  # fmt: skip
        got = compute(
            f"setp.{mods} %p|%q, %a, %b; @!%q add.u32 %a, %a, 1; selp.b32 %d, %a, %b, %p;", np.uint32, a=a, b=b
        )
        assert (got == np.where(expected, a + np.uint32(1), b)).all(), mods
    got = compute("setp.lt.u32 %p, %a, %b; setp.gt.and.s32 %q, %a, 5, !%p; selp.u32 %d, 1, 0, %q;", np.uint32, a=a, b=b)
    assert (got == ((signed_a > 5) & ~(a < b))).all()
    got = compute("slct.s32.s32 %d, %a, %b, %b;", np.int32, a=a, b=b)
    assert (got == np.where(signed_b >= 0, signed_a, signed_b)).all()


@pytest.mark.parametrize(
    ("mods", "source", "result"),
    [("s32.s8", np.int32, np.int32), ("u32.u16", np.uint32, np.uint32), ("s64.s32", np.int32, np.int64),
     ("u64.u32", np.int32, np.uint64), ("s16.s32", np.int32, np.int16), ("s64.u8", np.int16, np.int64)],
)  # fmt: skip
def test_integers_of_other_widths(mods: str, source: type[np.integer], result: type[np.integer]) -> None:
    a = numbers(source)
    to, from_ = (np.dtype({"s": "i", "u": "u"}[k[0]] + str(int(k[1:]) // 8)) for k in mods.split("."))
    assert (compute(f"cvt.{mods} %d, %a;", result, a=a) == a.astype(from_).astype(to).astype(result)).all()


def test_saturating_conversion() -> None:
    a = numbers(np.int32)
    assert (compute("cvt.sat.s8.s32 %d, %a;", np.int16, a=a) == np.clip(a, -128, 127)).all()
    assert (compute("cvt.sat.u16.s32 %d, %a;", np.uint16, a=a) == np.clip(a, 0, 65535)).all()


def test_division_by_zero_is_an_error() -> None:
    with pytest.raises(PtxError, match=r"divides by zero"):
        compute("div.s32 %d, %a, %b;", np.int32, a=np.array([1, 2], np.int32), b=np.array([1, 0], np.int32))


@pytest.mark.parametrize("body", ["add.q32 %d, %a, %a;", "frob.b32 %d, %a;", "mad.lo.cc.s32 %d, %a, %a, %a;",
                                  "add.s64 %d, %a, %a;", "call foo;", "mov.u32 %d, %clock;"])  # fmt: skip
def test_what_is_not_known_is_an_error(body: str) -> None:
    with pytest.raises(PtxError):
        compute(body, np.int32, a=np.array([1], np.int32))
