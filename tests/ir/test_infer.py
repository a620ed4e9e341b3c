"""Types of new operations."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tests.subjects import Subjects
from tfqc.errors import IRError
from tfqc.ir.infer import infer_type
from tfqc.ir.program import Program
from tfqc.ir.types import TensorType, parse_type

aten = torch.ops.aten


def test_equal_numbers_of_other_types_give_other_types(subject: Subjects) -> None:
    program = subject("unet2d").program
    time = program.node("timestep")
    before = next(n for n in program.nodes() if n.op == "call_function")
    found = [program.types[program.insert(before, aten.add.Tensor, (time, one)).name] for one in (1, 1.0, 1)]
    assert [t.dtype for t in found if isinstance(t, TensorType)] == [torch.int64, torch.float32, torch.int64]


def typed(
    target: object, *args: object, symbols: dict[str, int], guards: tuple[str, ...] = (), **kwargs: object
) -> str:
    """The type of an operation on values of given types."""
    graph = fx.Graph()
    program = Program({"step": graph}, {}, (), symbols=symbols, guards=guards)

    def value(item: object) -> object:
        if not isinstance(item, str):
            return [value(i) for i in item] if isinstance(item, list) else item
        node = graph.placeholder(f"p{len(graph.nodes)}")
        program.types[node.name] = parse_type(item)
        return node

    node = graph.create_node("call_function", target, tuple(map(value, args)), dict(kwargs), name="n")  # type: ignore[arg-type]
    return str(infer_type(program, node))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_shapes_do_not_agree_by_accident(batch: int) -> None:
    """Whatever the example's sizes were: equal ones, or those of channels."""
    same = {"B": batch, "H": 8, "W": 8, "R": 1}
    assert typed(aten.flatten.using_ints, "BxBxf32", symbols={"B": batch}) == "(B*B)xf32"
    assert typed(aten.flatten.using_ints, "BxHxWx3xf32", 0, 2, symbols=same) == "(B*H*W)x3xf32"
    assert typed(aten.cat.default, ["Bx4xf32", "2x4xf32", "Hx4xf32"], symbols=same) == "(B + H + 2)x4xf32"
    assert typed(aten.add.Tensor, "Rx4xf32", "Bx4xf32", symbols=same) == "Bx4xf32"
    assert typed(aten.neg.default, "Rx4xf32", symbols=same) == "Rx4xf32"
    assert typed(aten.transpose.int, "HxWxf32", 0, 1, symbols=same) == "WxHxf32"
    assert typed(aten.constant_pad_nd.default, "BxHxf32", [1, 2], symbols=same) == "Bx(H + 3)xf32"


def test_sizes_keep_to_guards() -> None:
    half = typed(aten.view.default, "Hx4xf32", [2, -1], symbols={"H": 6}, guards=("H % 6 == 0", "H <= 12"))
    assert half == "2x(2*H)xf32"


def test_what_follows_in_no_simple_way_is_refused() -> None:
    with pytest.raises(IRError, match=r"follows .* in no simple way"):
        typed(aten.slice.Tensor, "Hxf32", 0, 0, 40, symbols={"H": 8})
    with pytest.raises(IRError, match="gives more or fewer"):
        typed(aten.unbind.int, "Bx2xf32", symbols={"B": 2})


def test_nothing_large_is_made() -> None:
    """On no device: types of terabytes are found at once, and millions of values are refused."""
    assert typed(aten.full.default, [10**6] * 3, 1.0, symbols={}) == "1000000x1000000x1000000xf32"
    cpu = torch.device("cpu")
    assert typed(aten.zeros.default, [10**9, 10**6], symbols={}, device=cpu) == "1000000000x1000000xf32"
    with pytest.raises(IRError, match="it would give 1000000000 values"):
        typed(aten.unbind.int, "1000000000xf32", symbols={})
