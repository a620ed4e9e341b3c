"""Every denoiser class of diffusers through the whole path: captured, folded, quantized, run.

    python bench/denoisers.py                   # goes on where bench/results/denoisers.json ends
    python bench/denoisers.py --only NAME ...   # these anew

Small configurations with random weights (tests/zoo/denoisers). Each class is a process of its own. What it answers is
compared with the model itself, at the timesteps of a schedule and for other batches. The table goes to bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.zoo.denoisers import DENOISERS, NO_DENOISERS  # noqa: E402
from tests.zoo.walk import CLOSE, EXACT, Walk, walk  # noqa: E402

RESULTS = HERE / "results" / "denoisers.json"
README = HERE / "README.md"
BEGIN, END = "<!-- denoisers -->\n", "<!-- end of denoisers -->\n"
SECONDS = 3600  # other jobs may have most of the cores


def main() -> None:
    """Compute what is missing, and write the table after each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(DENOISERS), help="compute these anew")
    parser.add_argument("--one", choices=list(DENOISERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(asdict(walk(options.one, DENOISERS[options.one]))))
        return
    results: dict[str, Walk] = {}
    if RESULTS.exists():
        results = {name: Walk(**fields) for name, fields in json.loads(RESULTS.read_text()).items()}
    for name in options.only or [name for name in DENOISERS if name not in results]:
        results[name] = in_a_process(name)
        print(name, row(name, results[name]), flush=True)
        RESULTS.write_text(json.dumps({n: asdict(results[n]) for n in DENOISERS if n in results}, indent=1) + "\n")
        write(table({n: results[n] for n in DENOISERS if n in results}))


def in_a_process(name: str) -> Walk:
    """A class that takes too long, or brings its process down, is refused for that."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Walk(refused={"process": f"not done after {SECONDS} s"})
    if done.returncode:
        return Walk(refused={"process": (done.stderr.strip().splitlines() or ["no word"])[-1][:400]})
    return Walk(**json.loads(done.stdout.strip().splitlines()[-1]))


def table(results: dict[str, Walk]) -> str:
    """Totals, a row for each class, also for those that were not run yet, and what else those packages hold."""
    runs = [walked for walked in results.values() if not walked.torch]
    parts = {
        "captured": sum(w.seconds is not None for w in runs),
        f"equal to {EXACT:g} without quantization": sum(w.exact is not None and w.exact <= EXACT for w in runs),
        f"within {CLOSE:g} at W8A8 on fake-quant": sum(
            w.fake_quant is not None and w.fake_quant <= CLOSE for w in runs
        ),
        "on cpu-int8": sum(w.cpu_int8 is not None and w.cpu_int8 <= CLOSE for w in runs),
    }
    counts = ", ".join(f"{count} {what}" for what, count in parts.items())
    whole = sum(w.whole for w in runs)
    lines = [
        f"{len(results)} of {len(DENOISERS)} classes were run, of which {len(runs)} do in torch: {counts}. "
        f"The whole path: {whole} ({100 * whole / len(runs):.0f}%).",
        "",
        "| class | capture, s | temporal features | fake-quant, nothing quantized | W8A8 fake-quant | cpu-int8 | |",
        "|---|---|---|---|---|---|---|",
        *(row(name, results[name]) if name in results else f"| {name} | | | | | | not run yet |" for name in DENOISERS),
        "",
        "No denoisers, so not run: " + ", ".join(f"{name} ({why})" for name, why in NO_DENOISERS.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def row(name: str, walked: Walk) -> str:
    """A line of the table."""
    numbers = [walked.seconds, walked.features, walked.exact, walked.fake_quant, walked.cpu_int8]
    cells = ["" if n is None else f"{n:.2g}" if isinstance(n, float) and n < 1 else f"{n:g}" for n in numbers]
    if walked.torch:
        said = f"does not run in torch: {walked.torch}"
    else:
        said = "; ".join(f"refused at {stage} because {why}" for stage, why in walked.refused.items())
    return f"| {' | '.join([name, *cells, said.replace('|', '/').replace(chr(10), ' ')[:300]])} |"


def write(text: str) -> None:
    """Put the table where the README has it."""
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
