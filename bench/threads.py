"""Threads and long runs: the same answers as alone, memory that stays flat, steps that stay fast.

    python bench/threads.py                # 2 to 8 threads, 10,000 calls each, on one model and on several; a soak
    python bench/threads.py --calls 500    # the same, shorter

Every call's answer is compared bit for bit with what one thread got for it. The soak goes through nine batch sizes in
turn and prints steps a second and resident memory over time. JSON goes to bench/results/threads.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the threads are those of the program
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

import tfqc  # noqa: E402
from tests.artifacts.__main__ import small_artifact  # noqa: E402
from tests.helpers import first  # noqa: E402

TARGETS = ("fake-quant{weights=4 activations=8}", "cpu-int8")
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9)
TIMES = (999, 749, 499, 249, 33, 512)  # the last two are in no table


def call(batch: int, t: int) -> dict[str, Any]:
    """Inputs of the small model, the same for the same numbers."""
    made = torch.Generator().manual_seed(1000 * batch + t)
    shapes = {"sample": (batch, 3, 8, 8), "prompt": (batch, 8)}
    inputs = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    return {**inputs, "timestep": torch.tensor(t)}


def race(directory: Path, threads: int, models: int, calls: int) -> dict[str, Any]:
    """`threads` threads with `calls` calls each, on `models` loaded models in turn."""
    alone = tfqc.load(directory)
    cases = [call(b, t) for b in BATCHES[:4] for t in TIMES]
    want = [first(alone(**case)) for case in cases]
    loaded = [tfqc.load(directory) for _ in range(models)]
    wrong: list[str] = []

    def work(number: int) -> None:
        model = loaded[number % models]
        for turn in range(calls):
            at = (turn * (2 * number + 1) + number) % len(cases)
            try:
                if not torch.equal(first(model(**cases[at])), want[at]):
                    wrong.append(f"case {at} differs")
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

    began = time.perf_counter()
    pool = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    seconds = time.perf_counter() - began
    return {"threads": threads, "models": models, "calls": threads * calls, "wrong": len(wrong),
            "first": wrong[:1], "calls_per_s": threads * calls / seconds}  # fmt: skip


def soak(directory: Path, steps: int) -> list[dict[str, Any]]:
    """Ten stretches of a run over nine batch sizes in turn."""
    model = tfqc.load(directory)
    cases = [call(b, TIMES[i % 4]) for i, b in enumerate(BATCHES)]
    rows: list[dict[str, Any]] = []
    for stretch in range(10):
        began = time.perf_counter()
        for turn in range(steps // 10):
            model(**cases[turn % len(cases)])
        rate = steps // 10 / (time.perf_counter() - began)
        rows.append({"steps": (stretch + 1) * (steps // 10), "steps_per_s": rate, "MiB": _resident()})
    return rows


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Both tables for each target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "threads.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as work:
        for target in TARGETS:
            directory = small_artifact(target).save(Path(work) / target.partition("{")[0])
            races = [race(directory, n, m, options.calls) for n, m in ((2, 1), (4, 1), (8, 1), (4, 2), (8, 4))]
            result[target] = {"races": races, "soak": soak(directory, options.calls)}
            print(f"\n{target}\n")
            print(tabulate(races, headers="keys", floatfmt=".0f"))
            print(tabulate(result[target]["soak"], headers="keys", floatfmt=".1f"))
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
