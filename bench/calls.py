"""Wrong calls and the sentence that each gets, for every backend.

    python bench/calls.py

The calls are those of tests/backends/border.py, which holds them to their sentences. JSON: bench/results/calls.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.backends.border import WRONG  # noqa: E402
from tests.backends.conformance import compile_for  # noqa: E402
from tests.models import unet_sd  # noqa: E402
from tests.subjects import of_example  # noqa: E402
from tfqc.driver import load  # noqa: E402

TARGETS = ("fake-quant", "cpu-int8", "cuda-int4{arch=sm_86}")


def main() -> None:
    """One line a call where all backends say the same, else one for each backend."""
    warnings.simplefilter("ignore")
    its = of_example("unet-sd", unet_sd)
    said: dict[str, dict[str, str]] = {name: {} for name in WRONG}
    with tempfile.TemporaryDirectory() as work:
        for target in TARGETS:
            name = target.partition("{")[0]
            directory = compile_for(its, target, "fold", Path(work) / f"{name}.work")[1].save(Path(work) / name)
            model = load(directory)
            for wrong, (change, _, _) in WRONG.items():
                try:
                    model(**change(its.call([750.0, 750.0])))
                    said[wrong][name] = "taken"
                except (TypeError, ValueError) as error:
                    said[wrong][name] = f"{type(error).__name__}: {error}"
    for wrong, answers in said.items():
        if len(set(answers.values())) == 1:
            answers = {"all": next(iter(answers.values()))}
        for backend, sentence in answers.items():
            print(f"{wrong} ({backend}): {sentence}")
    (HERE / "results" / "calls.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
