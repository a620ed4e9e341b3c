"""What does split-concat give on the model that ships, at W4A8 and W4A4?

    python bench/split_concat.py                 # 8 images, 20 DDIM steps; results in bench/results/split-concat.json

Each pair of rows is the same recipe without the pass and with it before `plan-quantization`: the same calibration,
noise and labels. PSNR is to full precision, in dB, averaged over images; images are sampled with fake-quant.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import tfqc
from tfqc.driver import load
from tfqc.models.find import find_model
from tfqc.sampling.loop import initial_noise, sample

TARGETS = {
    "W4A8": "fake-quant{weights=4 activations=8}",
    "W4A4": "fake-quant{weights=4 activations=4}",
}
RESULTS = Path(__file__).parent / "results" / "split-concat.json"


def main() -> None:
    """Compute both rows of each target, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    bench = Bench(options)
    rows = {name: bench.pair(target) for name, target in TARGETS.items()}
    config = {"images": options.images, "steps": options.steps, "seed": options.seed}
    options.out.write_text(json.dumps({"config": config, "rows": rows}, indent=1) + "\n")
    print(table(rows))


class Bench:
    """The model, its images at full precision, and those of what is compiled from it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.spec = options, find_model("fashion-unet")
        assert self.spec.conditions is not None
        self.cond, self.uncond = self.spec.conditions(options.images, options.seed)
        self.noise = initial_noise(options.images, self.spec.sample_shape(), options.seed)
        self.work = Path(tempfile.mkdtemp(prefix="tfqc-bench-"))
        self.reference = self.images(self.spec.model)

    def pair(self, target: str) -> dict[str, list[float]]:
        """PSNR of each image, without the pass and with it."""
        parsed = tfqc.Target.parse(target)
        plain = parsed.backend.pipeline(parsed.options, "fold")
        split = plain.replace("plan-quantization", "split-concat,plan-quantization", 1)
        return {"without": self.psnr(target, plain), "with": self.psnr(target, split)}

    def psnr(self, target: str, pipeline: str) -> list[float]:
        """PSNR of each image of a pipeline."""
        artifact = tfqc.compile(
            self.spec, target, pipeline=pipeline, steps=self.options.steps, workdir=self.work / "trajectories"
        )
        images = self.images(load(artifact.save(self.work / f"{target}-{'split-concat' in pipeline}")))
        error = (images - self.reference).flatten(1).square().mean(1)
        found = [round(v, 3) for v in (-10 * error.clamp(min=1e-14).log10()).tolist()]
        print(target, pipeline.count("split-concat"), found, flush=True)
        return found

    def images(self, denoiser: torch.nn.Module) -> Tensor:
        """Images [N, C, H, W] in 0..1."""
        assert self.spec.decode is not None
        return self.spec.decode(
            sample(
                denoiser,
                self.spec.scheduler,
                steps=self.options.steps,
                latents=self.noise,
                cond=self.cond,
                uncond=self.uncond,
                guidance=self.spec.guidance,
                batch_size=self.options.images,
            )
        )


def table(rows: dict[str, Any]) -> str:
    """The rows as GitHub markdown."""
    lines: list[list[str]] = []
    for name, row in rows.items():
        before, after = row["without"], row["with"]
        mean = [f"{sum(values) / len(values):.2f}" for values in (before, after)]
        better = sum(b > a for a, b in zip(before, after, strict=True))
        lines.append([name, *mean, f"{better} of {len(before)}"])
    return tabulate(lines, ["", "without, dB", "with, dB", "images nearer"], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
