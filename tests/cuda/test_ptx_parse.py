"""PTX text as compilers and inline assembly write it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import PtxError
from tests.ptx.parse import parse
from tests.ptx.snippet import HEADER, compute

MODULE = (
    HEADER
    + """
.extern .shared .align 128 .b8 dynamic[];
.const .align 4 .b8 table[8] = {1, 0, 0, 0, 255};
.global .align 4 .u32 counter;
.global .align 2 .u16 pair[2] = {65535, 0x10};
.visible .func (.param .b32 result) helper(.param .b32 x) { .reg .b32 %r<2>; ret; }
.visible .entry first(
\t.param .u64 .ptr .global .align 16 first_param_0,
\t.param .align 8 .b8 first_param_1[48]
)
.maxntid 64, 2, 1
.minnctapersm 2
{
\t.shared .align 16 .b8 tile[32];
\t.reg .pred \t%p<2>;
\t.loc\t1 2 3
\tmov.u32 \t%r0, 1; // a comment; with a semicolon
/* and { one } of
   several lines */
$L__BB0_1:
\t@!%p1 bra $L__BB0_1;
\tret;
}
.entry second() { ret; }
"""
)


def test_declarations() -> None:
    module = parse(MODULE)
    first = module.kernels["first"]
    assert list(module.kernels) == ["first", "second"]
    assert [(p.size, p.align) for p in first.params] == [(8, 16), (48, 8)]
    assert (first.max_threads, first.registers, first.labels) == (128, {"%p0": "pred", "%p1": "pred"}, {"$L__BB0_1": 1})
    assert {v.name: v.data for v in module.variables if v.space in ("const", "global")} == {
        "table": bytes([1, 0, 0, 0, 255, 0, 0, 0]), "counter": bytes(4), "pair": b"\xff\xff\x10\0",
    }  # fmt: skip
    assert [v.name for v in module.variables if v.extern] == ["dynamic"]


def test_instructions_know_their_lines() -> None:
    move, jump, end = parse(MODULE).kernels["first"].body
    lines = MODULE.split("\n")
    assert [lines[each.line - 1].split()[0] for each in (move, jump, end)] == ["mov.u32", "@!%p1", "ret;"]
    assert (jump.negated, jump.mods, move.opcode, move.name) == (True, (), "mov.u32", "mov")


def test_scopes_of_inline_assembly() -> None:
    """Registers of an inner block hide those around it; directives may stand without a space between them."""
    body = """
    mov.b32 %t1, %a;
    {.reg.b32   %t1, C;
       .reg .b16 low,high;
      mov.b32 C, 0X10U;
      {.reg .b32 C; mov.b32 C, 5; add.s32 %t2, C, 1;}
      mov.b32 {low,high},%a;
      mov.b32 %t1, {high,low};
      add.s32 %d, %t1, C;}
    add.s32 %d, %d, %t1; add.s32 %d, %d, %t2;
    """
    a = np.array([0x00020001], np.uint32)
    assert compute(body, np.uint32, a=a)[0] == 0x00010002 + 0x10 + 0x00020001 + 6


def test_numbers() -> None:
    a = np.zeros(1, np.uint32)
    for text, bits in {
        "-1": 0xFFFFFFFF,
        "0x1fU": 31,
        "-2147483648": 1 << 31,
        "0f3F800000": 0x3F800000,
        "7U": 7,
    }.items():
        assert compute(f"mov.b32 %d, {text};", np.uint32, a=a)[0] == bits


NONSENSE = [
    "mov.b32 %d, %nothing", "add.s32 %d, %a, %a %a;", "@%none mov.b32 %d, 1;", "mov.b32 %d, ~1;", "bra NOWHERE;",
    "ld.global.u32 %d, [nothing];", "mov.f32 %d, 0d0000000000000000;",
]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE)
def test_text_that_makes_no_sense(text: str) -> None:
    with pytest.raises(PtxError):
        compute(text, np.uint32, a=np.zeros(1, np.uint32))


def test_unknown_directives() -> None:
    with pytest.raises(PtxError, match=r"unknown directive '\.texref'"):
        parse(HEADER + ".texref t;")
