"""Directories that tfqc writes results to, and in which it touches nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from tfqc.errors import TfqcError


def claim(directory: Path, ours: str, what: str, sign: str = "") -> list[Path]:
    """Make a directory, or make sure that it holds nothing but what an earlier run wrote there.

    Args:
        ours: a pattern of the names that a run writes; links are never ours.
        sign: a pattern of the one that tells it from a directory in which somebody keeps files of such names: every
            run writes it first. Without it, the names alone tell.

    Returns:
        What is there.

    Raises:
        TfqcError: the directory holds something else, or is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise TfqcError(f"{directory} is a file: choose a directory for the {what}.")
    directory.mkdir(parents=True, exist_ok=True)
    present = sorted(directory.iterdir())
    foreign = [file.name for file in present if not re.fullmatch(ours, file.name) or file.is_symlink()]
    if sign and not any(re.fullmatch(sign, file.name) for file in present):
        foreign += [file.name for file in present if not file.is_dir()]
    if foreign:
        raise TfqcError(f"{directory} holds {foreign[0]!r}, which is no {what}: choose another directory.")
    return present
