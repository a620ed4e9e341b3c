"""The option `skip` of passes: layers that are left as they are, by the paths of their modules."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import fx

from tfqc.analysis.weighted import weighted_nodes
from tfqc.errors import PassError
from tfqc.ir.program import Program


def skipped(program: Program, patterns: Iterable[str]) -> set[fx.Node]:
    """Linears and convolutions of @step that lie in a module which a pattern names, or in a part of it.

    A pattern is a module path, compared component by component: `down_blocks.1` is not `down_blocks.10`. Within a
    component `*` and `?` stand for any characters: `down_blocks.*.attentions`.

    Raises:
        PassError: a pattern that names nothing (with near misses).
    """
    modules = {n: program.origins[n.name].module for n in weighted_nodes(program) if n.name in program.origins}
    found: set[fx.Node] = set()
    for pattern in patterns:
        named = {node for node, module in modules.items() if _within(module, pattern)}
        if not named:
            raise PassError(
                f"skip={pattern}: no linear or convolution of {program.model} lies there."
                + _near(pattern, modules.values())
            )
        found |= named
    return found


def _within(module: str, pattern: str) -> bool:
    parts, wanted = module.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))


def _near(pattern: str, modules: Iterable[str]) -> str:
    prefixes = {".".join(parts[:n]): None for m in modules if (parts := m.split(".")) for n in range(1, len(parts) + 1)}
    close = get_close_matches(pattern, [p for p in prefixes if p], n=3)
    known = close or sorted({p.partition(".")[0] for p in prefixes if p})
    return f" {'Near it' if close else 'Modules'}: {', '.join(known) or 'none'}."
