"""mma against plain products of matrices, for all types and signs; fragments by the layouts, and by ldmatrix."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import PtxError, layouts, run
from tests.ptx.layouts import Fragment
from tests.ptx.snippet import HEADER

RANDOM = np.random.default_rng(2)
WARPS = 2
BITS = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "f16": 16, "bf16": 16}


def kernel(opcode: str, a: int, b: int, c: int, d: int) -> str:
    """Each thread loads its registers of A, B and C from [threads, registers] and stores those of D."""

    def registers(name: str, count: int) -> str:
        return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"

    loads = ""
    for position, (name, count) in enumerate((("a", a), ("b", b), ("c", c))):
        loads += f"ld.param.u64 %at, [p{position}]; mad.wide.u32 %at, %tid, {4 * count}, %at;\n"
        loads += "".join(f"ld.global.b32 %{name}{i}, [%at+{4 * i}];\n" for i in range(count))
    stores = "".join(f"st.global.b32 [%at+{4 * i}], %d{i};\n" for i in range(d))
    return (
        HEADER
        + f"""
.visible .entry mma(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3) {{
  .reg .b64 %at; .reg .b32 %tid, %a<{a}>, %b<{b}>, %c<{c}>, %d<{d}>;
  mov.u32 %tid, %tid.x;
  {loads}
  {opcode} {registers("d", d)}, {registers("a", a)}, {registers("b", b)}, {registers("c", c)};
  ld.param.u64 %at, [p3]; mad.wide.u32 %at, %tid, {4 * d}, %at;
  {stores}
  ret;
}}
"""
    )


def fragments(matrices: np.ndarray, fragment: Fragment, bits: int) -> np.ndarray:
    """[warps, rows, columns] of raw bits to [threads, registers]."""
    values = np.array(
        [[m[fragment.at(lane, i)] for i in range(fragment.elements)] for m in matrices for lane in range(32)], np.uint64
    )
    per = 32 // bits
    packed = values.reshape(len(values), -1, per) << (np.arange(per, dtype=np.uint64) * np.uint64(bits))
    return packed.sum(2).astype(np.uint32)


def matrices(threads: np.ndarray, fragment: Fragment) -> np.ndarray:
    """[threads, elements] to [warps, rows, columns]."""
    result = np.zeros((len(threads) // 32, fragment.rows, fragment.columns), threads.dtype)
    for thread, values in enumerate(threads):
        for i, value in enumerate(values):
            result[thread // 32][fragment.at(thread % 32, i)] = value
    return result


@pytest.mark.parametrize("shape", layouts.MMA)
def test_each_element_is_in_one_thread(shape: tuple[str, int]) -> None:
    layout = layouts.MMA[shape]
    for fragment in (layout.a, layout.b, layout.c):
        places = {fragment.at(lane, i) for lane in range(32) for i in range(fragment.elements)}
        assert places == {(r, c) for r in range(fragment.rows) for c in range(fragment.columns)}
        assert len(places) == 32 * fragment.elements


def integers(kind: str, shape: tuple[int, ...], extreme: bool) -> np.ndarray:
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    return RANDOM.choice([low, high], shape) if extreme else RANDOM.integers(low, high, shape, endpoint=True)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("b_sign", "su")
@pytest.mark.parametrize("a_sign", "su")
@pytest.mark.parametrize(("shape", "bits"), [shape for shape in layouts.MMA if shape[1] < 16])
def test_integers(shape: str, bits: int, a_sign: str, b_sign: str, extreme: bool) -> None:
    layout = layouts.MMA[shape, bits]
    a_kind, b_kind = f"{a_sign}{bits}", f"{b_sign}{bits}"
    a = integers(a_kind, (WARPS, layout.a.rows, layout.a.columns), extreme)
    b = integers(b_kind, (WARPS, layout.b.rows, layout.b.columns), extreme)
    c = RANDOM.integers(-(2**31), 2**31, (WARPS, 16, 8))
    mask = (1 << bits) - 1
    threads = [fragments(a & mask, layout.a, bits), fragments(b & mask, layout.b, bits)]
    threads += [fragments(c & 0xFFFFFFFF, layout.c, 32), np.zeros((32 * WARPS, 4), np.uint32)]
    for saturates in ("", ".satfinite"):
        opcode = f"mma.sync.aligned.{shape}.row.col{saturates}.s32.{a_kind}.{b_kind}.s32"
        text = kernel(opcode, threads[0].shape[1], threads[1].shape[1], 4, 4)
        counters = run(text, "mma", (1, 1, 1), (32 * WARPS, 1, 1), threads)
        expected = a @ b + c
        expected = np.clip(expected, -(2**31), 2**31 - 1) if saturates else expected.astype(np.int32)
        assert (matrices(threads[3].view(np.int32), layout.c) == expected).all()
        assert sum(counters.mma.values()) == WARPS


@pytest.mark.parametrize("result", ["f32", "f16"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_floats(kind: str, result: str) -> None:
    """Small whole numbers, of which every order of sums is exact."""
    layout = layouts.MMA["m16n8k16", 16]
    a, b, c = (RANDOM.integers(-8, 8, (WARPS, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))

    def bits(values: np.ndarray, of: str) -> np.ndarray:
        if of == "bf16":
            return values.astype(np.float32).view(np.uint32) >> 16
        return values.astype(of.replace("f", "float")).view(f"u{int(of[1:]) // 8}")

    width = int(result[1:])
    threads = [fragments(bits(a, kind), layout.a, 16), fragments(bits(b, kind), layout.b, 16)]
    threads += [fragments(bits(c, result), layout.c, width), np.zeros((32 * WARPS, 4 * width // 32), np.uint32)]
    opcode = f"mma.sync.aligned.m16n8k16.row.col.{result}.{kind}.{kind}.{result}"
    text = kernel(opcode, 4, 2, threads[2].shape[1], threads[3].shape[1])
    if (kind, result) == ("bf16", "f16"):
        with pytest.raises(PtxError, match=r"unknown instruction"):
            run(text, "mma", (1, 1, 1), (64, 1, 1), threads)
        return
    run(text, "mma", (1, 1, 1), (64, 1, 1), threads)
    got = threads[3].view(np.float32 if result == "f32" else np.float16)
    assert (matrices(got, layout.c) == a @ b + c).all()


LDMATRIX = (
    HEADER
    + """
.visible .entry load(.param .u64 p0, .param .u64 p1) {{
  .shared .align 16 .b8 tile[1024];
  .reg .b64 %at; .reg .b32 %tid, %to, %from, %r<4>, %v;
  mov.u32 %tid, %tid.x;
  ld.param.u64 %at, [p0]; mad.wide.u32 %at, %tid, {bytes}, %at;
  mov.u32 %to, tile; mad.lo.s32 %to, %tid, {bytes}, %to;
  {copy}
  bar.sync 0;
  mov.u32 %from, tile; mad.lo.s32 %from, %tid, 16, %from;
  ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{targets}}}, [%from];
  ld.param.u64 %at, [p1]; mad.wide.u32 %at, %tid, {bytes}, %at;
  {store}
  ret;
}}
"""
)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_ldmatrix(number: int, trans: str) -> None:
    """Row r of a matrix is spread over threads 4r ... 4r+3; threads that give no row may have any address."""
    tile = RANDOM.integers(0, 2**16, (number, 8, 8)).astype(np.uint16)
    out = np.zeros((32, number), np.uint32)
    copy = "".join(f"ld.global.b32 %v, [%at+{4 * i}]; st.shared.b32 [%to+{4 * i}], %v;\n" for i in range(number))
    text = LDMATRIX.format(
        number=number, trans=trans, copy=copy, bytes=4 * number,
        targets=", ".join(f"%r{i}" for i in range(number)),
        store="".join(f"st.global.b32 [%at+{4 * i}], %r{i};" for i in range(number)),
    )  # fmt: skip
    run(text, "load", (1, 1, 1), (32, 1, 1), [tile, out])
    expected = tile.transpose(0, 2, 1) if trans else tile
    for matrix in range(number):
        assert (out[:, matrix].copy().view(np.uint16).reshape(8, 8) == expected[matrix]).all()


def test_fragments_of_the_wrong_size_are_refused() -> None:
    text = kernel("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", 2, 2, 4, 4)
    with pytest.raises(PtxError, match=r"a fragment of 2 registers instead of 4"):
        run(text, "mma", (1, 1, 1), (32, 1, 1), [np.zeros((32, n), np.uint32) for n in (2, 2, 4, 4)])
