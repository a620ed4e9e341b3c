"""Does a refactoring change what the compiler computes? Artifacts and answers of two commits, compared.

    python bench/same_bytes.py write OLD     # with the commit before: about ten minutes on one core
    python bench/same_bytes.py write NEW     # with the commit after
    python bench/same_bytes.py compare OLD NEW

`write` compiles small models of random weights at every strategy, target and option, and keeps the artifacts, what they
answer to fixed calls, and the sentences of refusals. It leaves out cases that are there, so a directory belongs to one
commit. Only names that `tfqc` itself exports are used, so the script runs whatever modules are called.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # sums of several threads have no fixed order; read when torch is imported

import torch
from safetensors.torch import load_file
from same_cases import cases, done
from tabulate import tabulate
from torch import Tensor

import tfqc


def write(into: Path, only: str) -> None:
    """Every case whose name holds `only` and that is not there yet."""
    for case in cases():
        if only in case.name and not done(into / case.name):
            began = time.monotonic()
            print(f"{case.name}: {case.write(into)}, {time.monotonic() - began:.1f} s", flush=True)


# -- compare: each check returns what it found, and whether the same is computed --------------------------------------

Found = tuple[str, bool]
Read = Callable[[Path], dict[str, Any]]


def differing(old: Path, new: Path, read: Read, same: Callable[[Any, Any], bool] = operator.eq) -> list[str]:
    """Names of what is in one alone or not the same in both."""
    had, has = read(old), read(new)
    return [name for name in sorted(had.keys() | has.keys()) if name not in had or not same(had[name], has.get(name))]


def tensors(old: Path, new: Path) -> Found:
    """Names, dtypes, shapes and bytes of the tensors of two artifacts."""

    def read(artifact: Path) -> dict[str, Tensor]:
        files = artifact.glob("*.safetensors")
        return {f"{file.stem}:{name}": value for file in files for name, value in load_file(file).items()}

    differ = differing(old, new, read, same_tensor)
    return (f"{len(differ)} differ: {', '.join(differ[:3])}", False) if differ else (f"same {len(read(old))}", True)


def same_tensor(a: Tensor, b: Tensor | None) -> bool:
    """True if the second is there and equal, bit by bit."""
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def kernels(old: Path, new: Path) -> Found:
    """Bytes of the kernels' sources."""
    differ = differing(old, new, lambda artifact: {file.name: file.read_bytes() for file in artifact.glob("kernels.*")})
    return (f"{', '.join(differ)} differs", False) if differ else ("same", True)


def program(old: Path, new: Path) -> Found:
    """The program as text, or else as the tfqc that is installed reads and writes it."""
    texts = [(artifact / "program.ir").read_text() for artifact in (old, new)]
    if texts[0] == texts[1]:
        return "same text", True
    try:
        had, has = (tfqc.render(tfqc.parse(text)) for text in texts)
    except tfqc.TfqcError as error:
        return f"cannot be read: {error}", False
    return ("same program", True) if had == has else ("differs", False)


def outputs(old: Path, new: Path) -> Found:
    """The answers to every call; NaN equals NaN."""

    def same(a: Tensor, b: Tensor | None) -> bool:
        if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

    differ = differing(old, new, lambda case: load_file(case / "outputs.safetensors"), same)
    return (f"differ at {', '.join(differ)}", False) if differ else ("same", True)


def manifest(old: Path, new: Path) -> Found:
    """Facts but hashes, sizes, lines of the report and versions; with others, the same may be computed."""

    def read(artifact: Path) -> dict[str, Any]:
        facts = json.loads((artifact / "manifest.json").read_text())
        return {**facts, "files": sorted(facts["files"]), "report": None, "versions": None}

    differ = differing(old, new, read)
    return f"other {', '.join(differ)}" if differ else "same", True


def row(old: Path, new: Path) -> tuple[list[str], bool]:
    """Cells of a case's row, and whether both directories hold the same."""
    if lacking := [str(case.parent) for case in (old, new) if not done(case)]:
        return [f"lacks in {', '.join(lacking)}"], False
    refusals = [file.read_text() if (file := case / "refused.txt").exists() else None for case in (old, new)]
    if refusals != [None, None]:
        both = refusals[0] == refusals[1]
        return ["refused alike" if both else "not refused alike"], both
    a, b = old / "artifact", new / "artifact"
    text = ("same text" if (a / "model.py").read_text() == (b / "model.py").read_text() else "other text", True)
    found = [tensors(a, b), kernels(a, b), program(a, b), outputs(old, new), text, manifest(a, b)]
    return [cell for cell, _ in found], all(right for _, right in found)


def compare(old: Path, new: Path, only: str) -> bool:
    """Print a row for each case whose name holds `only`; False if one computes something else, or lacks."""
    rows = {case.name: row(old / case.name, new / case.name) for case in cases() if only in case.name}
    headers = ("case", "tensors", "kernels", "program.ir", "outputs", "model.py", "manifest")
    print(tabulate([(name, *cells) for name, (cells, _) in rows.items()], headers=headers))
    wrong = sum(not right for _, right in rows.values())
    print(f"{len(rows)} cases: {len(rows) - wrong} compute the same, {wrong} do not")
    return wrong == 0


def main() -> None:
    """Write the cases of this commit, or compare those of two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, directories in (("write", ["DIR"]), ("compare", ["OLD", "NEW"])):
        command = commands.add_parser(name)
        for directory in directories:
            command.add_argument(directory, type=Path)
        command.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name holds it")
    options = parser.parse_args()
    if options.command == "write":
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        write(options.DIR, options.only)
    elif not compare(options.OLD, options.NEW, options.only):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
