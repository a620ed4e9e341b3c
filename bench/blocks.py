"""What blocks that are reconstructed together keep (BRECQ with learned steps), beside what they start from.

    python bench/blocks.py          # 64 images, 20 DDIM steps; results in bench/results/blocks.json

As `bench/time_scales.py`: the model that ships, features folded, weights of 4 bits by GPTQ, calibrated on 16 images.
Rows that are in the JSON file are not computed again.
"""

from __future__ import annotations

from pathlib import Path

from time_scales import main

STEPS, TDQ = "calibrate-activations{{bits={a} mode=per-step}}", "learn-time-scales{{bits={a}}}"
WAYS = {
    "ranges of each step": STEPS,
    "ranges of each step, reconstruct-blocks": f"{STEPS},reconstruct-blocks",
    "TDQ": f"{TDQ},{STEPS}",
    "TDQ, reconstruct-blocks": f"{TDQ},{STEPS},reconstruct-blocks",
}
RESULTS = Path(__file__).parent / "results" / "blocks.json"

if __name__ == "__main__":
    main(WAYS, RESULTS, __doc__)
