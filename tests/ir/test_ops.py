"""The IR is data: which operations a program may hold, and with which operands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny
from tfqc.errors import CaptureError, IRError
from tfqc.frontend import capture
from tfqc.ir.aten import FUNCTIONAL
from tfqc.ir.ops import PYTHON, op_by_name, op_name, register
from tfqc.ir.parse import parse
from tfqc.ir.render import render

HEAD = """tfqc-ir 1
model "m"
stage captured
symbols B=2
input %x sample ["x"]: Bx4xf32
input %t time ["t"]: Bxi64

func @step(%x: Bx4xf32, %t: Bxi64) {
"""


def body(*lines: str) -> str:
    return HEAD + "".join(f"  {line}\n" for line in lines) + "  return %x\n}\n"


@pytest.mark.parametrize(
    "line",
    [
        '%a: int = operator.attrgetter("__deepcopy__.__func__.__globals__")',
        "%a: int = operator.call(%x)",
        '%a: int = operator.methodcaller("numpy")',
        "%a: int = operator.itemgetter(0)",
        "%a: int = operator.setitem(%x, 0, 1)",
        '%a: int = torch.load("F")',
        '%a: int = torch.ops.load_library("F")',
        "%a: int = math.__loader__.load_module(1)",
        '%a: 10xf32 = aten.from_file.default("F", True, 10)',
        "%a: int = prim.__class__.default(%x)",
        "%a: Bx4xf32 = aten.__class__.default(%x)",
        "%a: Bx4xf32 = aten.add.__class__(%x)",
        "%a: Bx4xf32 = aten.add.out(%x, %x, out=%x)",
        "%a: Bx4xf32 = aten.randn_like.default(%x)",
        "%a: Bx4xf32 = aten.bernoulli.p(%x, 0.5)",
        "%a: Bx4xf32 = aten.normal_.default(%x)",
        "%a: Bx4xf32 = aten.dropout.default(%x, 0.5, True)",
        "%a: Bx4xf32 = aten.set_.source_Tensor(%x, %x)",
        "%a: Bx4xf32 = aten.resize_.default(%x, [9])",
        "%a: Bx4xf32 = aten.data.default(%x)",
        "%a: float = aten._local_scalar_dense.default(%x)",
        "%a: 9x9xf32 = aten.as_strided.default(%x, [9, 9], [1, 1], 0)",
        "%a: 9xf32 = aten.empty_strided.default([9], [1])",
        "%a: none = aten.record_stream.default(%x, 0)",
        "%a: none = aten.manual_seed.default(0)",
        "%a: Bx4xf32 = tfqc.no_such.default(%x)",
        "%a: Bx4xf32 = acme.scale.default(%x)",
    ],
)
def test_what_is_no_operation_of_programs_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IRError, match="IR line 9"):
        parse(body(line))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('%a: f32 = operator.getitem(%x, "torch")', "cannot take %x: Bx4xf32 as operand 1"),
        ("%a: int = operator.add(1, 2, 3)", "takes 2 operands"),
        ("%a: int = operator.add(%x, 1)", "cannot take %x: Bx4xf32 as operand 1"),
        ("%a: Bx4xf32 = aten.relu.default()", "needs its operand 'self'"),
        ("%a: Bx4xf32 = aten.relu.default(%x, 1)", "takes 1 operands, not 2"),
        ("%a: Bx4xf32 = aten.relu.default(%x, self=%x)", "is given 'self' twice"),
        ("%a: Bx4xf32 = aten.relu.default(%x, cmd=1)", "has no operand 'cmd'"),
        ("%a: Bx4xf32 = aten.relu.default(1)", "cannot take 1 as 'self', which is Tensor"),
        ('%a: Bx4xf32 = aten.sum.dim_IntList(%x, "1")', "as 'dim', which is Optional[List[int]]"),
        ("%a: Bx4xf32 = aten.cat.default([%x, None])", "as 'tensors', which is List[Tensor]"),
        ("%a: Bx4xf32 = aten.softmax.int(%x, 1, %t)", "as 'dtype', which is Optional[ScalarType]"),
        ("%a: Bx4xf32 = aten.mul.Tensor(%x, 99999999999999999999)", "a whole number of 64 bits"),
        ("%a: Bx4xf32 = aten.view.default(%x, [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]])", "no more than 16 brackets"),
    ],
)  # fmt: skip
def test_operands_fit_the_schema(line: str, sentence: str) -> None:
    with pytest.raises(IRError) as error:
        parse(body(line))
    assert sentence in str(error.value)


def test_captured_programs_alone_work_in_place() -> None:
    text = body("%a: Bx4xf32 = aten.relu_.default(%x)")
    assert render(parse(text)) == text
    with pytest.raises(IRError, match="only captured programs have such"):
        parse(text.replace("stage captured", "stage normalized"))


def test_memory_that_nobody_wrote_reads_as_zeros() -> None:
    text = body("%a: Bx4xf32 = aten.empty_like.default(%x)")
    assert "aten.zeros_like.default(%x)" in render(parse(text))


def test_names_and_operations_are_inverse() -> None:
    for name, (function, _) in PYTHON.items():
        assert op_by_name(name) is function
        assert op_name(function) == name
    assert not [name for name in FUNCTIONAL if not hasattr(torch.ops.aten, name)]


def test_reading_imports_nothing() -> None:
    parse(render(tiny()))
    before = set(sys.modules)
    for name in ("antigravity.x.default", "aten.antigravity", "tfqc.antigravity.default"):
        with pytest.raises(IRError):
            parse(body(f"%a: f32 = {name}(%x)"))
    assert "antigravity" not in set(sys.modules) - before


class Noisy(torch.nn.Module):
    """Draws noise of its own."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x) * t[:, None]


def test_capture_refuses_what_could_not_be_read_back() -> None:
    with pytest.raises(
        CaptureError, match=r"The model calls aten\.randn_like\.default at test_ops\.py:\d+: No operation"
    ):
        capture(Noisy(), {"x": torch.zeros(2, 4), "t": torch.tensor([1, 2])})


def test_registering_what_is_not_a_plugins() -> None:
    with pytest.raises(IRError, match=r"an overload of a plug-in's own torch\.library namespace can"):
        register(torch.ops.aten.randn.default)
    library = torch.library.Library("tfqc_test_ops", "DEF")
    library.define("spoil(Tensor(a!) x) -> Tensor")
    with pytest.raises(IRError, match="it writes to its operand 'x'"):
        register(torch.ops.tfqc_test_ops.spoil.default)
