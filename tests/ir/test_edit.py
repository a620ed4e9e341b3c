"""Rewriting: canonical calls, patterns, types that follow, rules that end, names in constant time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from tests.helpers import find
from tfqc.errors import IRError, PassError
from tfqc.ir import parse, render, verify
from tfqc.ir.calls import canonical, defaults, is_canonical, written
from tfqc.ir.edit import Rewriter, Rule, rewrite
from tfqc.ir.match import View, call, capture, match, operand, read_once
from tfqc.ir.program import Program
from tfqc.ir.rows import Tib
from tfqc.ir.views import Add, Conv, Linear

aten = torch.ops.aten
TEXT = """tfqc-ir 1
model "m"
stage normalized
symbols B=2
input %x sample ["x"]: Bx3x8x8xf32
input %t time ["t"]: Bxi64
tensor @w: 4x3x3x3xf32
tensor @b: 4xf32

func @step(%x: Bx3x8x8xf32, %t: Bxi64) {
  %conv: Bx4x8x8xf32 = aten.conv2d.default(%x, @w, None, [1, 1], [1, 1])   {at="a" tib="body"}
  %mul: Bx4x8x8xf32 = aten.mul.Tensor(%conv, 2.0)   {at="b"}
  %add: Bx4x8x8xf32 = aten.add.Tensor(%conv, %mul)
  %silu: Bx4x8x8xf32 = aten.silu.default(%add)
  return %silu
}
"""


def program() -> Program:
    return parse(TEXT)


def test_operands_have_names_and_defaults() -> None:
    conv = program().node("conv")
    assert conv.args == () and list(conv.kwargs) == [a.name for a in aten.conv2d.default._schema.arguments]
    assert conv.kwargs["dilation"] == [1, 1] and conv.kwargs["groups"] == 1 and conv.kwargs["bias"] is None


def test_text_leaves_out_what_is_as_usual() -> None:
    text = render(program())
    assert "aten.conv2d.default(%x, @w, padding=[1, 1])" in text and "aten.add.Tensor(%conv, %mul)" in text
    assert render(parse(text)) == text


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "wanted"),
    [
        (aten.avg_pool2d.default, ("x", 2), {}, {"kernel_size": [2, 2], "stride": []}),
        (aten.contiguous.default, ("x",), {}, {"memory_format": torch.contiguous_format}),
        (aten.tril_indices.default, (3, 3), {}, {"dtype": torch.int64, "offset": 0}),
        (aten.add.Tensor, ("x", 1), {"alpha": 2}, {"alpha": 2, "other": 1}),
        (aten.gelu.default, (), {"self": "x", "approximate": "tanh"}, {"approximate": "tanh"}),
    ],
    ids=str,
)
def test_calls_in_any_form_are_one(target: Any, args: Any, kwargs: Any, wanted: dict[str, Any]) -> None:
    positional, named = canonical(target, args, kwargs)
    assert positional == () and wanted.items() <= named.items()
    assert canonical(target, (), named) == ((), named)


def test_python_operators_stay_in_order() -> None:
    import operator

    assert canonical(operator.add, ("a", 1), {}) == (("a", 1), {})


def test_every_default_is_one_that_text_can_hold() -> None:
    from tfqc.ir.aten import FUNCTIONAL
    from tfqc.ir.ops import op_by_name
    from tfqc.ir.render import render_value

    for packet in sorted(FUNCTIONAL):
        for overload in getattr(aten, packet).overloads() if hasattr(aten, packet) else ():
            try:
                target = op_by_name(f"aten.{packet}.{overload}")
            except Exception:
                continue
            for value in defaults(target).values():
                render_value(value)


def test_a_call_by_position_is_none_of_a_normalized_program() -> None:
    its = program()
    node = its.node("silu")
    node.args, node.kwargs = (its.node("add"),), {}
    assert not is_canonical(node)
    with pytest.raises(Exception, match="%silu has operands by position"):
        verify(its)


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_views_read_operands() -> None:
    its = program()
    conv = Conv.of(its.node("conv"))
    assert conv is not None and conv.input is its.node("x") and conv.padding == [1, 1] and conv.bias is None
    assert Linear.of(its.node("conv")) is None and Conv.of(3) is None and Conv.of(its.node("x")) is None


def test_a_mistyped_operation_or_operand_fails_where_it_is_written() -> None:
    with pytest.raises(AttributeError):
        _ = aten.conv2d.defualt
    with pytest.raises(TypeError, match=r"aten.silu.default has no operand 'input'"):
        call(aten.silu.default, input=capture("x"))
    with pytest.raises((TypeError, RuntimeError)) as caught:

        class Wrong(View):
            targets = (aten.silu.default,)
            x = operand[fx.Node]("input")

    assert "has no operand 'input'" in str(caught.value) + str(caught.value.__cause__)


def test_a_pattern_finds_either_order() -> None:
    its = program()
    doubled = call(aten.mul.Tensor, self=capture("x"), other=2.0)
    pattern = call(aten.add.Tensor, self=doubled, other=capture("rest"), commutes=True)
    (found,) = match(pattern, its.node("add"))
    assert found == {"x": its.node("conv"), "rest": its.node("conv")}
    assert not list(match(call(aten.add.Tensor, self=doubled), its.node("add")))  # which stands second
    assert not list(match(call(aten.mul.Tensor, other=2), its.node("mul")))  # 2 is not 2.0


def test_once_is_once() -> None:
    its = program()
    assert read_once(its.node("mul")) and not read_once(its.node("conv"))
    Rewriter(its).become(its.node("add"), aten.add.Tensor, its.node("mul"), its.node("mul"))
    assert not read_once(its.node("mul"))


# -- rewriting ---------------------------------------------------------------------------------------------------------


def test_types_follow_as_far_as_they_change() -> None:
    its = program()
    edit = Rewriter(its)
    edit.update(its.node("conv"), stride=[2, 2])
    assert [str(its.types[n]) for n in ("conv", "mul", "add", "silu")] == ["Bx4x4x4xf32"] * 4
    verify(its)


def test_names_readers_and_rows_stay() -> None:
    its = program()
    edit, conv = Rewriter(its), its.node("conv")
    made = edit.insert(its.node("mul"), aten.relu.default, conv)
    assert its.origins[made.name].module == "b" and its.types[made.name] == its.types["conv"]
    edit.replace(its.node("mul"), made)
    assert its.node("add").kwargs["other"] is made
    edit.replace(conv, edit.insert(conv, aten.conv2d.default, **conv.kwargs))
    its.prune()
    assert its.table(Tib) == {"conv2d": Tib("body")}
    verify(its)


def test_an_unknown_operand_is_refused() -> None:
    its = program()
    with pytest.raises(KeyError, match=r"aten.silu.default has no operand 'slope'"):
        Rewriter(its).update(its.node("silu"), slope=1.0)


def test_rules_apply_until_none_does() -> None:
    def halve(edit: Rewriter, node: fx.Node, x: fx.Node) -> None:
        edit.become(node, aten.add.Tensor, x, x)

    def merge(edit: Rewriter, node: fx.Node, x: fx.Node) -> bool:
        if Add(node).self_ is not Add(node).other:
            return False
        edit.become(node, aten.mul.Tensor, x, 3.0)
        return True

    its = program()
    rules = [
        Rule(call(aten.mul.Tensor, self=capture("x"), other=2.0), halve),
        Rule(call(aten.add.Tensor, self=capture("x")), merge),
    ]
    assert rewrite(its, rules) == 2  # the sum that the first makes is what the second finds
    assert its.node("mul").kwargs["other"] == 3.0 and its.node("add").target is aten.add.Tensor
    verify(its)


def test_rules_without_an_end_are_refused() -> None:
    def swap(edit: Rewriter, node: fx.Node, a: Any, b: Any) -> None:
        edit.become(node, aten.add.Tensor, b, a)

    rules = [Rule(call(aten.add.Tensor, self=capture("a"), other=capture("b")), swap)]
    with pytest.raises(PassError, match=r"rules do not come to an end: %add"):
        rewrite(program(), rules)


def test_what_cannot_be_rewritten_is_refused() -> None:
    its = program()
    with pytest.raises(IRError, match=r"%silu .*cannot be replaced by itself"):
        Rewriter(its).replace(its.node("silu"), its.node("silu"))
    with pytest.raises(PassError, match=r"no @nope: it has @step"):
        rewrite(its, [], "nope")


def test_what_nothing_reads_goes() -> None:
    def forget(edit: Rewriter, node: fx.Node, x: fx.Node) -> None:
        edit.replace(node, x)

    its = program()
    assert rewrite(its, [Rule(call(aten.add.Tensor, self=capture("x")), forget)]) == 1
    assert not find(its, "aten.mul") and "mul" not in its.types


def test_text_of_calls() -> None:
    assert written(program().node("conv"))[1] == {"padding": [1, 1]}


def test_new_names_are_found_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of names is not made anew for nodes that are made one by one."""
    its = program()
    edit, before = Rewriter(its), its.node("silu")
    walks: list[None] = []
    real = fx.Graph.nodes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(fx.Graph, "nodes", property(lambda graph: (walks.append(None), real(graph))[1]))
    for _ in range(50):
        assert its.node(edit.insert(before, aten.relu.default, its.node("add")).name) is not before
    assert len(walks) == 0


@pytest.mark.parametrize(
    ("args", "operands", "why"),
    [((), {"bogus": 1}, "has no operand 'bogus'"), (("mul",), {}, "takes 1 operands, not 2")],
)
def test_operands_that_an_operation_has_not_are_refused(args: Any, operands: Any, why: str) -> None:
    its = program()
    edit, silu = Rewriter(its), its.node("silu")
    given = (its.node("add"), *map(its.node, args))
    for make in (lambda: edit.become(silu, aten.relu.default, *given, **operands),
                 lambda: edit.insert(silu, aten.relu.default, *given, **operands)):  # fmt: skip
        with pytest.raises(IRError, match=why):
            make()
    assert silu.target is aten.silu.default


def test_a_name_stands_for_one_value() -> None:
    its = program()
    twice = call(aten.add.Tensor, self=capture("x"), other=capture("x"))
    assert not list(match(twice, its.node("add")))
    Rewriter(its).become(its.node("add"), aten.add.Tensor, its.node("mul"), its.node("mul"))
    assert list(match(twice, its.node("add"))) == [{"x": its.node("mul")}]


def test_what_has_no_two_sides_does_not_commute() -> None:
    with pytest.raises(TypeError, match="no operands `self` and `other`"):
        call(aten.silu.default, commutes=True)
