"""The one way to rewrite a function: nodes that are made or changed are typed, and so are those that read them.

    edit = Rewriter(program)
    edit.become(node, torch.ops.aten.relu.default, self=x)     # computes in another way: name, readers, place stay
    edit.update(node, act="silu")                              # some operands replaced
    edit.replace(old, new)                                     # readers of old read new; old's rows go with them

or by rules, each a pattern (`tfqc.ir.match`) and what becomes of it:

    RULES = [Rule(call(aten.mul.Tensor, self=capture("x"), other=2.0), double)]
    rewrite(program, RULES)                                    # until none applies
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tfqc.errors import IRError, PassError
from tfqc.ir.calls import canonical
from tfqc.ir.data import STEP
from tfqc.ir.infer import infer_type
from tfqc.ir.match import Call, match
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program
from tfqc.ir.schema import check_call
from tfqc.ir.types import HALVES

_MOST = 64  # times that rules may apply for each node that there was: rules that undo each other would never end


@dataclass
class Rewriter:
    """Edits one function of a program. `touched` are nodes that were made or changed since it was emptied."""

    program: Program
    function: str = STEP
    touched: dict[fx.Node, None] = field(default_factory=dict[fx.Node, None])

    def insert(
        self,
        before: fx.Node,
        target: Any,
        /,
        *args: Any,
        name: str | None = None,
        like: fx.Node | None = None,
        **operands: Any,
    ) -> fx.Node:
        """A new call before a node, typed; `like` gives it its origin (default: `before`'s)."""
        made = self.program.insert(before, target, args, operands, name=name, function=self.function, like=like)
        self.touched[made] = None
        return made

    def read(self, before: fx.Node, tensor: str) -> fx.Node:
        """A stored tensor as operations compute with it: as it is, or in f32 where it is stored in half precision."""
        stored = self.program.tensor_node(tensor, self.function)
        if self.program.tensors[tensor].dtype not in HALVES:
            return stored
        cast = torch.ops.aten.to.dtype
        return self.insert(before, cast, stored, torch.float32, name=f"{stored.name}_f32", like=before)

    def become(self, node: fx.Node, target: Any, /, *args: Any, **operands: Any) -> None:
        """Let a node compute its value in another way: it keeps its name, its readers, its place, its rows.

        Raises:
            IRError: the operation takes no such operands.
        """
        check_call(target, args, operands, self.program.types)
        args, kwargs = canonical(target, args, operands)
        node.target, node.args, node.kwargs = target, args, kwargs
        self._changed(node)

    def update(self, node: fx.Node, **operands: Any) -> None:
        """Replace some of a call's operands.

        Raises:
            KeyError: it has no such operand.
        """
        if strange := sorted(operands.keys() - node.kwargs.keys()):
            raise KeyError(f"{op_name(node.target)} has no operand {strange[0]!r}")
        self.become(node, node.target, **{**node.kwargs, **operands})

    def reread(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let a reader of `old` read `new`."""
        reader.replace_input_with(old, new)
        self._changed(reader)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of `old` read `new`, and erase `old`; rows about it are then about `new`, if it has none.

        Raises:
            IRError: they are the same.
        """
        if old is new:
            raise IRError(f"{self.program.at(old)} cannot be replaced by itself: `become` makes a call another one.")
        readers = [user for user in old.users if user is not new]
        for table in self.program.tables.values():
            row = table.get(old.name)
            if row is not None and row.of_node:
                table.setdefault(new.name, row)
        self.program.replace(old, new)
        self.touched.pop(old, None)
        for reader in readers:
            self._changed(reader)

    def retype(self, node: fx.Node) -> None:
        """Infer the type of a node, and of those that read it as long as types change."""
        self._changed(node)

    def _changed(self, node: fx.Node) -> None:
        """Types of a node and of its readers, in order, as far as they change."""
        self.touched[node] = None
        waiting = {node}
        while waiting:
            first = min(waiting)
            waiting.remove(first)
            if first.op != "call_function":
                continue
            before = self.program.types.get(first.name)
            after = self.program.types[first.name] = infer_type(self.program, first)
            if before is not None and after != before:
                waiting.update(first.users)
                self.touched.update(dict.fromkeys(u for u in first.users if u.op == "call_function"))


Action = Callable[..., "bool | None"]


@dataclass(frozen=True)
class Rule:
    """What a pattern is rewritten to: `action(edit, node, **captures)`, which returns False where it does not apply."""

    pattern: Call
    action: Action

    def apply(self, edit: Rewriter, node: fx.Node) -> bool:
        """True if the node matched and was rewritten."""
        return any(self.action(edit, node, **found) is not False for found in match(self.pattern, node))


def rewrite(program: Program, rules: Sequence[Rule], function: str = STEP) -> int:
    """Apply rules, the first that fits, to every node in order and again to what they change. Returns how often.

    Nodes that nothing reads any more go.

    Raises:
        PassError: the rules do not come to an end, or the program has no such function.
    """
    if function not in program.functions:
        asked = "function by a graph, but by name" if isinstance(function, fx.Graph) else f"@{function}"
        raise PassError(f"The program has no {asked}: it has {', '.join(f'@{f}' for f in program.functions)}.")
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.pattern.targets:
            by_target.setdefault(target, []).append(rule)
    edit = Rewriter(program, function)
    graph = program.functions[function]
    waiting = deque(n for n in graph.nodes if n.op == "call_function")
    queued, times, most = set(waiting), 0, _MOST * max(len(waiting), 16)
    while waiting:
        node = waiting.popleft()
        queued.discard(node)
        if node._erased or node.op != "call_function":
            continue
        edit.touched.clear()
        if not _apply(by_target.get(node.target, ()), edit, node):
            continue
        times += 1
        if times > most:
            raise PassError(f"The rewriting rules do not come to an end: {program.at(node)} was rewritten again.")
        again = [n for n in _affected(edit.touched) if n not in queued]
        queued.update(again)
        waiting.extendleft(reversed(again))
    program.prune()
    return times


def _apply(rules: Iterable[Rule], edit: Rewriter, node: fx.Node) -> bool:
    return any(rule.apply(edit, node) for rule in rules)


def _affected(touched: Iterable[fx.Node]) -> list[fx.Node]:
    """Nodes that rules may now fit: those that were touched, and those that read them."""
    alive = [n for n in touched if not n._erased]
    return sorted({*alive, *(u for n in alive for u in n.users if u.op == "call_function")})
