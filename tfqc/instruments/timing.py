"""Time and peak memory of each pass."""

from __future__ import annotations

import json
import resource
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tfqc.instruments.written import write
from tfqc.ir.program import Program
from tfqc.passing.base import Pass
from tfqc.passing.instrument import Instrument


@dataclass(frozen=True)
class PassTiming:
    """One pass: wall-clock seconds, peak resident memory while it ran (MiB), operations of @step after it."""

    number: int
    name: str
    seconds: float
    peak_mib: float
    nodes: int


class Timing(Instrument):
    """Collects a `PassTiming` for each pass that ran, and writes `timing.json` into a directory if given one.

    Stands last among the instruments, so that it times the pass and not them.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.passes: list[PassTiming] = []
        self._began = 0.0
        self._sampler: _PeakSampler | None = None

    def before(self, program: Program, item: Pass, number: int) -> None:
        self._sampler = _PeakSampler()
        self._began = time.perf_counter()

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        assert self._sampler is not None
        seconds = time.perf_counter() - self._began
        nodes = sum(n.op == "call_function" for n in program.step.nodes)
        self.passes.append(PassTiming(number, item.name, round(seconds, 4), self._sampler.stop(), nodes))

    def finish(self, program: Program) -> None:
        if self._sampler is not None:  # a pass that failed has no `after`
            self._sampler.stop()
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            rows = [asdict(t) for t in self.passes]
            write(self.directory, "timing.json", json.dumps(rows, indent=1) + "\n")


class _PeakSampler:
    """Highest resident set while it lives. The kernel's own peak never falls, so a thread looks 50 times a
    second."""

    def __init__(self) -> None:
        self._peak = _resident_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, _resident_mib())

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        return round(max(self._peak, _resident_mib()), 1)


def _resident_mib() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:  # no /proc: the lifetime peak is the best there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
