"""What calls have to fulfil besides ranks and symbols: decisions on sizes that torch.export met on its way."""

from __future__ import annotations

import ast
import functools
import linecache
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tfqc.errors import CaptureError
from tfqc.frontend.arithmetic import NoArithmetic, comparison
from tfqc.frontend.export import call_tree, shape_environment
from tfqc.frontend.inputs import keys_of
from tfqc.frontend.symbols import Symbols

_TORCH = Path(str(torch.__file__)).parent


def guards_of(exported: torch.export.ExportedProgram, naming: Symbols, model: str) -> tuple[str, ...]:
    """Comparisons over the program's symbols that calls have to fulfil, each of them no consequence of those before.

    Two kinds are left out. What torch decides on the way about how results lie in memory (strides, sizes of 1) holds
    for the way, not for the result: every operation of the graph does the same without it. And what the model's code
    does for large tensors to lay them out anew (`.contiguous()`) computes nothing.

    Raises:
        CaptureError: the model's code decides by what is no integer arithmetic, such as the root of a size.
    """
    kept: list[str] = []
    environment = shape_environment(exported)
    for guard in environment.guards if environment else ():
        place = guard.sloc.framework_loc
        file, line = (place.filename, place.lineno or 0) if isinstance(place, traceback.FrameSummary) else ("", 0)
        relation = naming.expression(environment.replace(guard.expr))
        if relation in (sympy.true, sympy.false) or _lays_out(file, line):
            continue
        for part in relation.args if isinstance(relation, sympy.And) else (relation,):
            inside = _inside_torch(file)
            if inside and not _is_demand(part, inside):
                continue
            try:
                kept.append(comparison(part))
            except NoArithmetic as error:
                if inside:
                    continue  # a size that cannot be said is refused where it is one
                raise CaptureError(
                    f"{model} decides by {error} at {Path(file).name}:{line}, which is no integer arithmetic: calls "
                    "could not be checked for it. Decide by whole numbers, or capture these sizes as they are."
                ) from error
    return tuple(_independent(kept))


def _inside_torch(file: str) -> str:
    """Path in torch of what computes types there; empty for the model's code and for functions that models call."""
    path = Path(file)
    inside = path.relative_to(_TORCH).as_posix() if path.is_relative_to(_TORCH) else ""
    return inside if inside.startswith(("_", "fx/", "utils/")) else ""


def _is_demand(relation: Any, inside: str) -> bool:
    """True for what an operation asks of its operands, not for reasoning about strides and sizes of 1."""
    asks = inside.startswith(("_meta_registrations", "_subclasses/fake_impls"))
    return isinstance(relation, sympy.Eq) or (asks and not isinstance(relation, sympy.Ne))


@functools.cache
def _layouts(file: str) -> frozenset[int]:
    """Lines of the conditions of a file under which a tensor is only laid out anew: `x = x.contiguous()`.

    Diffusers has one in every upsampling, for batches from 64 on.
    """

    def only_lays_out(statement: ast.stmt) -> bool:
        match statement:
            case ast.Assign(targets=[target], value=ast.Call(func=ast.Attribute(value=value, attr="contiguous"))):
                return ast.unparse(target) == ast.unparse(value)
            case _:
                return False

    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    conditions = [n for n in ast.walk(tree) if isinstance(n, ast.If) and all(map(only_lays_out, [*n.body, *n.orelse]))]
    return frozenset(
        line for n in conditions for line in range(n.test.lineno, (n.test.end_lineno or n.test.lineno) + 1)
    )


def _lays_out(file: str, line: int) -> bool:
    return line in _layouts(file)


_SIZES = (*range(1, 35), 48, 63, 64, 65, 96, 100, 127, 128, 250, 256, 500, 512, 1000, 1024, 4096, 8192)
_MOST_POINTS = 300_000


def _independent(guards: Iterable[str]) -> list[str]:
    """Guards that are no consequence of each other, and as simple as they can be: `H % 2 == 0` for `H == 2*(H // 2)`.

    A consequence is what holds for all sizes out of a grid around the numbers that the guards mention.
    """
    guards = set(guards)
    names = sorted({name for guard in guards for name in re.findall(r"[A-Z]\w*", guard)})
    numbers = {int(number) for guard in guards for number in re.findall(r"\b\d+", guard)}
    near = {number + offset for number in numbers for offset in (-1, 0, 1)}
    sizes = np.array(sorted({*_SIZES, *(n for n in near if 0 < n <= 2**20)}))
    if len(sizes) ** len(names) > _MOST_POINTS:
        points = np.random.default_rng(0).choice(sizes, (len(names), _MOST_POINTS))
    else:
        points = np.array(list(product(sizes, repeat=len(names)))).T
    values = dict(zip(names, points, strict=True))

    def holds_for(guard: str) -> Any:  # the text is integer arithmetic: `comparison` wrote it
        return np.asarray(eval(guard, {"__builtins__": {}}, values))

    with np.errstate(divide="ignore"):
        holds = {guard: holds_for(guard) for guard in guards}
        multiples = {f"{name} % {n} == 0" for name in names for n in numbers if n > 1}
        holds |= {m: holds_for(m) for m in multiples}
    simple = [m for m in multiples if _follows(holds, m, guards)]
    kept: list[str] = []
    for guard in sorted({*guards, *simple}, key=lambda guard: (len(guard), guard)):
        if not _follows(holds, guard, kept):
            kept.append(guard)
    for guard in list(kept):
        if _follows(holds, guard, others := [g for g in kept if g != guard]):
            kept = others
    return kept


def _follows(holds: Mapping[str, Any], guard: str, others: Iterable[str]) -> bool:
    all_others = np.ones_like(holds[guard])
    for other in others:
        all_others &= holds[other]
    return bool((holds[guard] | ~all_others).all())


def check_guards(
    root: fx.GraphModule,
    exported: torch.export.ExportedProgram,
    dims: Mapping[tuple[str, ...], dict[int, str]],
    model: str,
    multiples: bool = False,
) -> None:
    """Refuse a capture that holds for the example's sizes only, as after `if x.shape[0] % 2:` in the model's code.

    torch.export remembers such decisions as guards. They must allow a batch of three (of three times the example's,
    where `multiples` will do), and for every other symbol its double or its half.
    """
    guards = getattr(root, "_guards_fn", None)
    if guards is None:
        return
    inputs = [n for n in root.graph.nodes if n.op == "placeholder"]
    leaves, _ = pytree.tree_flatten_with_path(call_tree(exported, inputs))
    path_of = {n: keys_of(path) for path, n in leaves}

    def complaint(symbol: str, resize: Callable[[int], int]) -> str:
        examples: list[Any] = []
        for node in inputs:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                named = dims.get(path_of[node], {})
                sizes = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in value.shape]
                sizes = [resize(s) if named.get(d) == symbol else s for d, s in enumerate(sizes)]
                value = torch.empty(sizes, dtype=value.dtype, device="meta")
            examples.append(value)
        try:
            guards(*examples)
        except AssertionError as error:
            return str(error).strip().splitlines()[0].removeprefix("Guard failed: ")
        return ""

    for symbol in sorted({s for d in dims.values() for s in d.values()}):
        ways: list[Callable[[int], int]] = [lambda s: 2 * s, lambda s: s // 2]
        if symbol == "B":
            ways = [(lambda s: 3 * s) if multiples else (lambda _: 3)]
        if all(reasons := [complaint(symbol, way) for way in ways]):
            raise CaptureError(
                f"{model} cannot be captured for every {symbol}: its code depends on {reasons[0]}.",
                "An `if` or an int(...) on a size fixes it; so does a view with that size as a number.",
            )
