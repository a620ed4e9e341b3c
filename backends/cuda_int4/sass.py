"""Machine code as nvdisasm lists it: kernels, their instructions, and the loop that multiplies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(.*?)\s*[;}]")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_OPCODE = re.compile(r"(?:@!?\w+\s+)?(\S+)")
_PADDING = "@!PT LDS RZ, [RZ]"  # never executed; put before the first LDGSTS, for a fault of the chip


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in order, and at which of them each label stands."""

    lines: tuple[str, ...]
    labels: dict[str, int]

    def main_loop(self) -> tuple[str, ...]:
        """The instructions of one turn of the loop with the most IMMA; empty where no loop has one.

        Raises ValueError if there is a loop in it: one turn is then no count of instructions.
        """
        loops = list(self._loops())
        best = max(loops, key=lambda loop: count(self.lines[slice(*loop)], "IMMA"), default=(0, 0))
        if any(best[0] <= begin and end <= best[1] and (begin, end) != best for begin, end in loops):
            raise ValueError("the main loop has a loop in it")
        body = tuple(line for line in self.lines[slice(*best)] if line != _PADDING)
        return body if count(body, "IMMA") else ()

    def _loops(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for at, line in enumerate(self.lines):
            branch = _BRANCH.search(line)
            if branch is not None and self.labels.get(branch.group(1), at) < at:
                found.append((self.labels[branch.group(1)], at + 1))
        return found


def listings(text: str) -> dict[str, Listing]:
    """The kernels of what `build.disassemble` gives."""
    found: dict[str, tuple[list[str], dict[str, int]]] = {}
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if section := _SECTION.match(line):
            lines, labels = found.setdefault(section.group(1), ([], {}))
        elif label := _LABEL.match(line):
            labels[label.group(1)] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction.group(1))
    return {name: Listing(tuple(lines), labels) for name, (lines, labels) in found.items()}


def opcode(line: str) -> str:
    """The opcode with its modifiers, without the predicate: IMMA.16864.U4.S4."""
    found = _OPCODE.match(line)
    return found.group(1) if found else ""


def count(lines: Sequence[str], name: str) -> int:
    """How many instructions are `name`, whatever their modifiers."""
    return sum(opcode(line).partition(".")[0] == name for line in lines)
