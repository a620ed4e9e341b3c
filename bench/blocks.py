"""What blocks that are reconstructed together keep (BRECQ with learned steps), beside what they start from.

    python bench/blocks.py          # 64 images, 20 DDIM steps; results in bench/results/blocks.json

As `bench/time_scales.py`: the model that ships, features folded, weights of 4 bits by GPTQ, calibrated on 16 images.
Rows that are in the JSON file are not computed again.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from time_scales import SETTINGS, Bench

STEPS, TDQ = "calibrate-activations{{bits={a} mode=per-step}}", "learn-time-scales{{bits={a}}}"
WAYS = {
    "ranges of each step": STEPS,
    "ranges of each step, reconstruct-blocks": f"{STEPS},reconstruct-blocks",
    "TDQ": f"{TDQ},{STEPS}",
    "TDQ, reconstruct-blocks": f"{TDQ},{STEPS},reconstruct-blocks",
}
RESULTS = Path(__file__).parent / "results" / "blocks.json"


def main() -> None:
    """Compute the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", "The model was compiled for")
    bench = Bench(options, WAYS)
    for setting in reversed(SETTINGS):
        for way in WAYS:
            bench.row(setting, way)
    print(bench.table())


if __name__ == "__main__":
    main()
