"""Fuzzing of all that reads what strangers write: IR text, specs, manifests, headers, calibration, schedules.

    python bench/fuzz.py --inputs 1000000            # the whole table; --seconds S ends it earlier; --resume goes on
    python bench/fuzz.py --targets ir --only 4711    # one input again, as it was

Input number n of a target depends on the seed, the target and n alone. Nothing may escape but a TfqcError (or what a
target module names in ALLOWED); a watch refuses writing outside the work directory, processes, sockets and imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from bench.fuzzing import Forbidden, Watch, mutated  # noqa: E402
from tfqc.errors import TfqcError  # noqa: E402

RESULT = HERE / "results" / "fuzz.json"
PACKAGES = (*sys.stdlib_module_names, "tfqc", "torch", "numpy", "sympy", "mpmath", "yaml", "safetensors", "pydantic",
            "pydantic_core", "bench")  # fmt: skip
LIMIT = 5  # seconds that one input may take
GIBIBYTES = 16  # of address space, so that an allocation that a text asks for fails and is seen


class Hang(BaseException):
    """An input took longer than it may."""


@dataclass
class Outcome:
    """What came of the inputs of one target; times in seconds."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    raw: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)  # the first input of each raw exception
    slowest: float = 0.0
    slowest_input: int = -1


@dataclass(frozen=True)
class Target:
    """A reader, inputs that it accepts, and what it may raise."""

    name: str
    run: Callable[[bytes, Path], None]
    seeds: list[bytes]
    allowed: tuple[type[Exception], ...]


def targets() -> list[Target]:
    """Those of all modules in fuzz_targets."""
    found: list[Target] = []
    for file in sorted((HERE / "fuzz_targets").glob("[a-z]*.py")):
        module = importlib.import_module(f"bench.fuzz_targets.{file.stem}")
        allowed = (TfqcError, *getattr(module, "ALLOWED", ()))
        found += [Target(name, run, module.SEEDS[name], allowed) for name, run in module.TARGETS.items()]
    return found


def data_of(target: Target, seed: int, number: int) -> bytes:
    """Input `number` of a target."""
    rng = random.Random(f"{seed}:{target.name}:{number}")
    return mutated(rng.choice(target.seeds), target.seeds, rng)


def attempt(target: Target, data: bytes, work: Path, watch: Watch) -> str:
    """ "accepted", "refused", or what escaped and from where."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    watch.on = True
    try:
        target.run(data, work)
    except target.allowed:
        return "refused"
    except (Exception, Forbidden, Hang) as error:
        watch.on = False
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "/tfqc/" in f.filename or "/passes/" in f.filename or "/backends/" in f.filename]
        where = own[-1] if own else frames[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted"


def fuzz(
    chosen: list[Target], inputs: int, seconds: float, seed: int, work: Path, outcomes: dict[str, Outcome]
) -> dict[str, Outcome]:
    """Run inputs on all targets in turn until there are `inputs` in all, beginning where `outcomes` end."""

    def hang(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {LIMIT} seconds")

    signal.signal(signal.SIGALRM, hang)
    watch = Watch(work, PACKAGES)
    watch.on = False
    for target in chosen:  # what is loaded at first use is loaded now
        for data in target.seeds:
            target.run(data, work)
    end, done = time.monotonic() + seconds, 0
    while done < inputs and time.monotonic() < end:
        for target in chosen:
            outcome = outcomes.setdefault(target.name, Outcome())
            number = outcome.inputs
            data = data_of(target, seed, number)
            began = time.perf_counter()
            what = attempt(target, data, work, watch)
            took = time.perf_counter() - began
            outcome.inputs += 1
            if what == "accepted":
                outcome.accepted += 1
            elif what == "refused":
                outcome.refused += 1
            else:
                outcome.raw[what] += 1
                outcome.examples.setdefault(what, number)
            if took > outcome.slowest:
                outcome.slowest, outcome.slowest_input = round(took, 3), number
            done += 1
    return outcomes


def table(outcomes: dict[str, Outcome]) -> str:
    """One line a target."""
    lines = [f"{'target':<20}{'inputs':>10}{'accepted':>10}{'refused':>10}{'raw':>6}{'slowest ms':>12}"]
    for name, o in outcomes.items():
        raw = sum(o.raw.values())
        lines.append(f"{name:<20}{o.inputs:>10}{o.accepted:>10}{o.refused:>10}{raw:>6}{1e3 * o.slowest:>12.0f}")
    return "\n".join([*lines, f"{'in all':<20}{sum(o.inputs for o in outcomes.values()):>10}"])


def _load(path: Path) -> dict[str, Outcome]:
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["targets"]
    return {name: Outcome(**{**row, "raw": Counter(row["raw"])}) for name, row in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=2407)
    parser.add_argument("--targets", default="", help="names, with commas; all by default")
    parser.add_argument("--only", type=int, help="run one input of each target, without catching anything")
    parser.add_argument("--resume", action="store_true", help="go on where the JSON file ends")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    known = targets()
    wanted = options.targets.split(",") if options.targets else [t.name for t in known]
    chosen = [t for t in known if t.name in wanted]
    with tempfile.TemporaryDirectory(prefix="tfqc-fuzz-") as directory:
        work = Path(directory)
        if options.only is not None:
            for target in chosen:
                data = data_of(target, options.seed, options.only)
                print(data.decode("utf-8", "replace"))
                target.run(data, work)
            return 0
        resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
        outcomes = fuzz(
            chosen, options.inputs, options.seconds, options.seed, work, _load(options.json) if options.resume else {}
        )
    print(table(outcomes))
    for name, outcome in outcomes.items():
        for what, count in outcome.raw.most_common():
            print(f"{name} {outcome.examples[what]}: {count} x {what}")
    rows = {name: asdict(o) for name, o in outcomes.items()}
    options.json.write_text(json.dumps({"seed": options.seed, "targets": rows}, indent=1) + "\n")
    return int(any(o.raw for o in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
