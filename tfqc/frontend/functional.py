"""Operations in place become values: what one changes, and what lies in the same memory, is computed anew after it.

x[..., 0::2] = y            %slice  = aten.slice(%x, ...)                 %x_1 = aten.slice_scatter(%x, %y, ...)
z = x + 1                   %copy_  = aten.copy_(%slice, %y)       ->     %z   = aten.add(%x_1, 1)
                            %z      = aten.add(%x, 1)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tfqc.errors import PassError
from tfqc.ir.edit import Rewriter
from tfqc.ir.infer import infer_type
from tfqc.ir.match import is_call, item_of
from tfqc.ir.ops import op_name, works_in_place
from tfqc.ir.program import Program
from tfqc.ir.types import Dim

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other)
COPIES = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default)
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)

# Views of the same values in another shape, and those of them that are copies of what does not lie in one piece.
_SHAPES = (
    aten.view.default, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.view_as.default,
)  # fmt: skip
_PERHAPS = (aten.reshape.default, aten.flatten.using_ints, aten.reshape_as.default, aten.ravel.default)
_SAME = (aten.alias.default, aten.detach.default, aten.contiguous.default, *CASTS, *DROPOUTS)
_OWN_INVERSES = (
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.numpy_T.default,
)


def functionalize(edit: Rewriter) -> None:
    """Rewrite all operations in place of a function.

    Raises:
        PassError: one writes to an input or to a tensor of the model, which others see, or through a view that cannot
            be turned around.
    """
    memory = _Memory(edit)
    for node in edit.program.nodes():
        if works_in_place(node.target):
            memory.write(node)
        elif is_alias(edit.program, node):
            memory.view(node)


def is_alias(program: Program, node: Any) -> bool:
    """True for a view, and for what may return its operand itself."""
    if not is_call(node) or is_call(node, *COPIES):
        return False
    if item := item_of(node):  # one of the views that `chunk` makes
        return is_alias(program, item[0])
    if is_call(node, *CASTS):  # a copy for another type, or when asked for one
        return not node.kwargs["copy"] and program.type(node) == program.type(node.all_input_nodes[0])
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return is_call(node, *DROPOUTS) or is_view


@dataclass
class _Memory:
    """Which values lie in the same memory, as it is at one place of the function.

    base: of a view, the value that it is one of. how: the call that made it, or one like it. together: of each value,
    all that lie in its memory, in order, first the one that is no view.
    """

    edit: Rewriter
    base: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    how: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    together: dict[fx.Node, list[fx.Node]] = field(default_factory=dict[fx.Node, list[fx.Node]])

    def view(self, node: fx.Node) -> None:
        """A view is made."""
        if isinstance(viewed := _operand(_made_by(node)), fx.Node):
            self._add(node, viewed, node)

    def _add(self, node: fx.Node, viewed: fx.Node, how: fx.Node) -> None:
        self.base[node], self.how[node] = viewed, how
        values = self.together.setdefault(viewed, [viewed])
        values.append(node)
        self.together[node] = values

    def write(self, node: fx.Node) -> None:
        """It becomes functional; what lies in the same memory is computed anew for later readers."""
        program, victim = self.edit.program, _operand(node)
        if not isinstance(victim, fx.Node):
            raise PassError(f"{program.at(node)}: {op_name(node.target)} writes to nothing.")
        chain = self._chain(victim)
        root, values = chain[-1], self.together.get(victim, [victim])
        if root.op != "call_function":
            raise PassError(
                f"{program.at(node)}: {op_name(node.target)} changes {_called(root)}, which is not this call's own: "
                "let the model change a copy (`.clone()`)."
            )
        later = {value: [user for user in value.users if node < user] for value in values}
        self._refuse_perhaps(node, chain, [value for value, users in later.items() if users])
        before = node.next
        anew = {victim: _become_functional(self.edit, node, victim)}
        for view in chain[:-1]:
            anew[self.base[view]] = _with_part(self.edit, before, self.base[view], self.how[view], anew[view])
        for value in values:
            if value not in anew and later[value]:
                for other in reversed(self._chain(value)):
                    if other not in anew:
                        anew[other] = _viewed_again(self.edit, before, self.how[other], anew[self.base[other]])
        for value in sorted(anew, key=values.index):
            if value in self.base:
                self._add(anew[value], anew[self.base[value]], self.how[value])
            for user in later[value]:
                self.edit.reread(user, value, anew[value])

    def _chain(self, value: fx.Node) -> list[fx.Node]:
        """A value, what it is a view of, and so on to what is none."""
        chain = [value]
        while (value := self.base.get(chain[-1], value)) is not chain[-1]:
            chain.append(value)
        return chain

    def _refuse_perhaps(self, node: fx.Node, chain: list[fx.Node], read: list[fx.Node]) -> None:
        """Whether `reshape` returns a view hangs on strides, which the IR does not have."""
        for value in read:
            between = {*chain} ^ {*self._chain(value)}
            if unsure := [v for v in between if v in self.how and is_call(self.how[v], *_PERHAPS)]:
                raise PassError(
                    f"{self.edit.program.at(node)}: {op_name(node.target)} may change %{value.name} or not, as "
                    f"%{unsure[0].name} is a view of it or a copy: use `.view` or `.clone` there."
                )


def _operand(node: fx.Node) -> Any:
    return next(iter(node.kwargs.values()), None)


def _made_by(node: fx.Node) -> fx.Node:
    """The operation that made a view: of one of several results, the one that made them all."""
    return item[0] if (item := item_of(node)) else node


def _number(view: fx.Node) -> int:
    """Which of several results a view is."""
    item = item_of(view)
    assert item, f"{view} is no item"
    return item[1]


def _called(value: fx.Node) -> str:
    return f"the input {value.name!r}" if value.op == "placeholder" else f"the model's tensor {value.target!r}"


def _become_functional(edit: Rewriter, node: fx.Node, victim: fx.Node) -> fx.Node:
    """What an operation in place leaves in its target, in the target's type; the node has that value, or goes to it."""
    program, name = edit.program, op_name(node.target)
    whole = program.tensor_type(victim)
    assert whole is not None
    if is_call(node, aten.copy_.default):
        source: Any = node.kwargs["src"]
        edit.become(node, aten.expand.default, self=source, size=_sizes(edit, node, victim, source))
    else:
        packet, _, overload = name.removeprefix("aten.").partition(".")
        functional = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
        if not packet.endswith("_") or functional is None:
            raise PassError(f"{program.at(node)}: {name} works in place and has no functional form that tfqc knows.")
        node.target = functional
    if infer_type(program, node) == program.type(victim):
        return node
    edit.retype(node)
    readers = list(node.users)
    result = edit.insert(node.next, aten.to.dtype, node, whole.dtype, like=node)
    for reader in readers:
        edit.reread(reader, node, result)
    return result


def _sizes(edit: Rewriter, before: fx.Node, like: fx.Node, source: fx.Node | None = None) -> list[Any]:
    """Sizes of a value, as operands; -1 where those of `source`, counted from the last, are the same."""
    type_, given = edit.program.tensor_type(like), edit.program.tensor_type(source) if source else None
    assert type_ is not None
    others = given.shape if given else ()
    same = [*[None] * (len(type_.shape) - len(others)), *others]
    return [
        -1 if size == other
        else size if isinstance(size, int)
        else edit.insert(before, aten.sym_size.int, like, dim)
        for dim, (size, other) in enumerate(zip(type_.shape, same, strict=True))
    ]  # fmt: skip


def _with_part(edit: Rewriter, before: fx.Node, whole: fx.Node, view: fx.Node, part: fx.Node) -> fx.Node:
    """A value in which what a view shows of it is replaced."""
    made = _made_by(view)
    given: Mapping[str, Any] = made.kwargs

    def made_anew(target: Any, *args: Any, **operands: Any) -> fx.Node:
        return edit.insert(before, target, *args, like=view, **operands)

    def cut(dim: Any, start: Any, end: Any, step: Any = 1) -> fx.Node:
        return made_anew(aten.slice_scatter.default, whole, part, dim, start, end, step)

    match made.target:
        case aten.slice.Tensor:
            return cut(given["dim"], given["start"], given["end"], given["step"])
        case aten.select.int:
            return made_anew(aten.select_scatter.default, whole, part, given["dim"], given["index"])
        case aten.narrow.default if isinstance(given["start"], int) and isinstance(given["length"], int):
            return cut(given["dim"], given["start"], given["start"] + given["length"])
        case aten.unbind.int:
            return made_anew(aten.select_scatter.default, whole, part, given["dim"], _number(view))
        case aten.permute.default:
            dims: Any = given["dims"]
            rank = len(dims)
            order = [int(dim) % rank for dim in dims]
            return made_anew(aten.permute.default, part, [order.index(dim) for dim in range(rank)])
        case aten.view_as_complex.default:
            return made_anew(aten.view_as_real.default, part)
        case aten.view_as_real.default:
            return made_anew(aten.view_as_complex.default, part)
        case _ if made.target in _OWN_INVERSES:
            return made_anew(made.target, part, **{k: v for k, v in given.items() if k != "self"})
        case _ if made.target in (*_SHAPES, *_PERHAPS):
            return made_anew(aten.reshape.default, part, _sizes(edit, before, whole))
        case _ if made.target in _SAME:
            return part
        case _ if item_of(view) and (place := _place(edit.program, view)):
            return cut(*place)
        case _:
            raise PassError(
                f"{edit.program.at(view)}: the model writes through {op_name(made.target)}, which tfqc cannot turn "
                "around: write to the value itself, or to a slice of it."
            )


def _place(program: Program, view: fx.Node) -> tuple[int, int, int] | None:
    """Dimension, begin and end of a part of `chunk` or `split`; None where sizes do not tell."""
    made, number = _made_by(view), _number(view)
    dim = made.kwargs.get("dim")
    parts: Any = getattr(program.type(made), "items", ())
    if not isinstance(dim, int):
        return None
    sizes: list[Dim] = [part.shape[dim] for part in parts[: number + 1]]
    whole = [size for size in sizes if isinstance(size, int)]
    return None if len(whole) < len(sizes) else (dim, sum(whole[:-1]), sum(whole))


def _viewed_again(edit: Rewriter, before: fx.Node, view: fx.Node, whole: fx.Node) -> fx.Node:
    """The same view of another value."""
    made = _made_by(view)
    operands: dict[str, Any] = dict(made.kwargs)
    operands[next(iter(operands))] = whole
    again = edit.insert(before, made.target, like=view, **operands)
    return again if made is view else edit.insert(before, operator.getitem, again, _number(view), like=view)
