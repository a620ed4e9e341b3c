"""Kernel sources of a backend as one text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def joined(folder: Path, *names: str) -> str:
    """Files of a folder, with its own headers put in where they are first included; other headers stay as they are."""
    seen: set[str] = set()

    def lines(name: str) -> Iterator[str]:
        seen.add(name)
        for line in (folder / name).read_text().splitlines():
            included = re.fullmatch(r'#include "(.+)"', line)
            if included is None:
                if line != "#pragma once":
                    yield line
            elif included.group(1) not in seen:
                yield from lines(included.group(1))

    return "\n".join(line for name in names if name not in seen for line in lines(name)) + "\n"
