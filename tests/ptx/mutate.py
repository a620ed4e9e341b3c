"""Kernels with one mistake: what a test of a kernel must be able to tell from the kernel itself.

Each mutation gives mutants for every place of the kernel that it applies to. A test runs every mutant as it
runs the kernel: it must raise `PtxError` or compute something else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from tests.ptx.scalars import WIDTHS


class Mutant(NamedTuple):
    """What was done, the PTX text after it, and the line where."""

    name: str
    text: str
    line: int


Edit = Callable[[str], Iterator[tuple[str, str]]]  # a line to (what was done, the line after it)


def _places(text: str, kernel: str) -> Iterator[int]:
    """Indices of the lines of the kernel that hold instructions."""
    inside = False
    for index, line in enumerate(text.split("\n")):
        if re.match(rf"\.(visible|weak)?\s*\.?entry\s+{re.escape(kernel)}\b", line.strip()):
            inside = True
        elif inside and line.startswith("}"):
            return
        elif inside and not line.strip().startswith(("//", ".")):
            yield index


def _apply(text: str, kernel: str, name: str, edit: Edit) -> list[Mutant]:
    lines = text.split("\n")
    mutants: list[Mutant] = []
    for index in _places(text, kernel):
        for what, line in edit(lines[index]):
            mutated = "\n".join([*lines[:index], line, *lines[index + 1 :]])
            mutants.append(Mutant(f"{name} at line {index + 1}: {what}", mutated, index + 1))
    return mutants


def _dropped(pattern: str) -> Edit:
    """Removes an instruction and its guard."""

    def edit(line: str) -> Iterator[tuple[str, str]]:
        found = re.search(rf"(@!?%\w+\s+)?\b({pattern})[^;]*;", line)
        if found:
            yield found.group().strip(), line[: found.start()] + line[found.end() :]

    return edit


def drop_barrier(text: str, kernel: str) -> list[Mutant]:
    return _apply(text, kernel, "drop barrier", _dropped(r"(bar|barrier)(\.cta)?\.(sync|warp\.sync)"))


def drop_copy(text: str, kernel: str) -> list[Mutant]:
    return _apply(text, kernel, "drop copy", _dropped(r"cp\.async\.c[ag]\."))


def drop_commit(text: str, kernel: str) -> list[Mutant]:
    return _apply(text, kernel, "drop commit", _dropped(r"cp\.async\.commit_group"))


def late_wait(text: str, kernel: str) -> list[Mutant]:
    """wait_group n -> n + 1."""

    def edit(line: str) -> Iterator[tuple[str, str]]:
        found = re.search(r"(cp\.async\.wait_group\s+)(\d+)", line)
        if found:
            more = f"{found[1]}{int(found[2]) + 1}"
            yield f"{found[0]} -> {more}", line.replace(found[0], more)
        if "cp.async.wait_all" in line:
            yield "wait_all -> wait_group 1", line.replace("cp.async.wait_all", "cp.async.wait_group 1")

    return _apply(text, kernel, "late wait", edit)


def swap_fragments(text: str, kernel: str) -> list[Mutant]:
    """Each two neighbours among the registers of A, and of B."""

    def edit(line: str) -> Iterator[tuple[str, str]]:
        if not line.strip().startswith("mma."):
            return
        vectors = list(re.finditer(r"\{([^}]*)\}", line))
        for which, vector in zip("ab", vectors[1:3], strict=True):
            registers = [register.strip() for register in vector[1].split(",")]
            for i in range(len(registers) - 1):
                if registers[i] == registers[i + 1]:
                    continue
                swapped = [*registers[:i], registers[i + 1], registers[i], *registers[i + 2 :]]
                inner = ",".join(swapped)
                yield f"{which}{i} and {which}{i + 1}", line[: vector.start(1)] + inner + line[vector.end(1) :]

    return _apply(text, kernel, "swap fragments", edit)


def wrong_sign(text: str, kernel: str) -> list[Mutant]:
    """s4 -> u4 and so on, of A and of B of each mma."""

    def edit(line: str) -> Iterator[tuple[str, str]]:
        found = re.search(r"\b(mma\.[\w.]+\.s32)\.([su])([48])\.([su])([48])\.s32", line)
        if found:
            head, a, bits, b, more = found.groups()
            other = {"s": "u", "u": "s"}
            for what, new in (("A", (other[a], b)), ("B", (a, other[b]))):
                opcode = f"{head}.{new[0]}{bits}.{new[1]}{more}.s32"
                yield f"{what} of {found[0]}", line.replace(found[0], opcode)

    return _apply(text, kernel, "wrong sign", edit)


def _access_width(opcode: str, line: str) -> int:
    if opcode.startswith("ldmatrix"):
        return 16
    if opcode.startswith("cp.async"):
        sizes = re.search(r"\],\s*(\d+)", line)
        return int(sizes[1]) if sizes else 16
    mods = opcode.split(".")
    return WIDTHS.get(mods[-1], 4) * (4 if "v4" in mods else 2 if "v2" in mods else 1)


def off_by_one(text: str, kernel: str) -> list[Mutant]:
    """Each address one access further, of loads, stores, copies and ldmatrix, but not of parameters."""

    def edit(line: str) -> Iterator[tuple[str, str]]:
        found = re.search(r"\b(ld|st|ldmatrix|cp\.async\.c[ag]|atom|red)\.[\w.:]+", line)
        if not found or ".param" in found[0]:
            return
        width = _access_width(found[0], line)
        for address in re.finditer(r"\[([%\w$]+)(\+(-?\d+))?\]", line):
            moved = f"[{address[1]}+{int(address[3] or 0) + width}]"
            yield f"{address[0]} -> {moved}", line[: address.start()] + moved + line[address.end() :]

    return _apply(text, kernel, "off by one", edit)


def wrong_sense(text: str, kernel: str) -> list[Mutant]:
    """@p -> @!p and back."""

    def edit(line: str) -> Iterator[tuple[str, str]]:
        found = re.search(r"@(!?)(%\w+)", line)
        if found:
            other = f"@{'' if found[1] else '!'}{found[2]}"
            yield f"{found[0]} -> {other} in {line.strip()}", line.replace(found[0], other, 1)

    return _apply(text, kernel, "wrong sense", edit)


MUTATIONS: dict[str, Callable[[str, str], list[Mutant]]] = {
    each.__name__: each
    for each in (
        drop_barrier, drop_copy, drop_commit, late_wait, swap_fragments, wrong_sign, off_by_one, wrong_sense,
    )
}  # fmt: skip


def mutants(
    text: str, kernel: str, lines: Collection[int] | None = None, at_most: int | None = None, seed: int = 0
) -> list[Mutant]:
    """All mutants of a kernel, or those at some lines of its text (such as `Counters.executed`, as a mistake where
    nothing runs is none); of each mutation at most so many, sampled.
    """
    chosen: list[Mutant] = []
    for each in MUTATIONS.values():
        made = [m for m in each(text, kernel) if lines is None or m.line in lines]
        if at_most is not None and len(made) > at_most:
            made = random.Random(seed).sample(made, at_most)
        chosen += made
    return chosen
