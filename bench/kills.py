"""Processes killed at random moments: while an artifact is saved, and while something is built for the cache.

    python bench/kills.py                       # 100 kills each; results in bench/results/kills.json

After each kill the artifact must load as the old or the new one, and every file of the cache must be whole; after the
next save, or the next build, nothing else may lie there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.killing import killed  # noqa: E402
from tfqc.codegen.artifact import Artifact, check_files  # noqa: E402
from tfqc.runtime.cache import cache_directory  # noqa: E402
from tfqc.runtime.kept import kept  # noqa: E402

CODE = os.urandom(300_000)


def saves(directory: Path, kills: int, seconds: float) -> Counter[str]:
    """What was found beside the artifact after each kill: by kind, in how many of them."""
    out, files = directory / "out", [_artifact(value).files() for value in range(2)]
    _artifact(0).save(out)

    def work() -> None:
        while True:
            for value in range(2):
                _artifact(value).save(out)

    found: Counter[str] = Counter()
    for number in range(kills):
        killed(work, number, seconds)
        names = {path.name for path in directory.iterdir()}
        found["between the renames"] += "out" not in names
        found["a part is left"] += any(".part" in name for name in names)
        found["an old one is left"] += any(".old" in name for name in names)
        check_files(out)
        now = {path.name: path.read_bytes() for path in out.iterdir()}
        found["the old or the new one, whole"] += now in files
    _artifact(0).save(out)
    found["left after the next save"] = len(list(directory.iterdir())) - 1
    return found


def builds(directory: Path, kills: int, seconds: float) -> Counter[str]:
    """The same of files that are built for the cache."""
    os.environ["XDG_CACHE_HOME"] = str(directory)

    def work() -> None:
        number = 0
        while True:
            number += 1
            kept([str(number)], ".so", _build)

    found: Counter[str] = Counter()
    for number in range(kills):
        killed(work, number, seconds)
        files = [path for path in cache_directory().iterdir() if path.is_file()] if cache_directory().is_dir() else []
        found["a build is left"] += any(path.is_dir() for path in cache_directory().parent.rglob(".making*"))
        found["all files are whole"] += all(path.read_bytes() == CODE for path in files)
        for path in files:
            path.unlink()
    last = kept(["last"], ".so", _build)
    found["left after the next build"] = len([path for path in cache_directory().iterdir() if path != last])
    return found


def _artifact(value: int) -> Artifact:
    weights = {str(n): torch.full((50, 100), float(value)) for n in range(20)}
    texts = {"model.py": f"value = {value}\n" * 100, "program.ir": "text\n" * 1000}
    return Artifact(texts, {"weights.safetensors": weights}, {"backend": "fake-quant"})


def _build(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(CODE), 4096):
            file.write(CODE[at : at + 4096])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.1, help="the longest time before a kill")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "kills.json")
    options = parser.parse_args()
    results: dict[str, dict[str, int]] = {}
    checks: tuple[tuple[str, Callable[[Path, int, float], Counter[str]]], ...] = (("save", saves), ("build", builds))
    for name, check in checks:
        with tempfile.TemporaryDirectory() as directory:
            results[name] = dict(check(Path(directory), options.kills, options.seconds))
        for what, count in results[name].items():
            print(f"{name:<8}{what:<36}{count:>6} of {options.kills}")
    options.json.write_text(json.dumps({"kills": options.kills, **results}, indent=1) + "\n")
    save, build = results["save"], results["build"]
    whole = save["the old or the new one, whole"] == build["all files are whole"] == options.kills
    return int(not whole or save["left after the next save"] > 0 or build["left after the next build"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
