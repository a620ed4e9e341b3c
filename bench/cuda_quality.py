"""What the modes of the cuda-int4 target cost in quality: groups, a low-rank branch, 4, 8 and 16 bits of activations.

    python bench/cuda_quality.py                 # 40 images, 50 DDIM steps; results in bench/results/cuda-quality.json

Images are sampled with the fake-quant backend from the pipeline of each target, whose integers are those of the CUDA
kernels (tests/cuda/test_end_to_end.py), and once with the target's own artifact, which computes with torch where there
is no GPU. PSNR is to full precision on the same seeds. Rows that are in the JSON file are not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import tfqc
from tfqc.driver import load
from tfqc.models.find import find_model
from tfqc.sampling.loop import initial_noise, sample

TARGETS = (
    "cuda-int4{mode=w4a16}",
    "cuda-int4{mode=w4a16 group=128}",
    "cuda-int4{mode=w4a8}",
    "cuda-int4{mode=w4a8 group=128}",
    "cuda-int4{mode=w4a4}",
    "cuda-int4{mode=w4a4 activations=per-token}",
    "cuda-int4{mode=w4a4 group=128}",
    "cuda-int4{mode=w4a4 rank=32}",
    "cuda-int4{mode=w4a4 group=128 rank=32}",
)
OWN = "cuda-int4{mode=w4a4}"  # also sampled with its own artifact
RESULTS = Path(__file__).parent / "results" / "cuda-quality.json"


def main() -> None:
    """Compute the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", "Kernels for CUDA")
    bench = Bench(options)
    bench.row("fp32", bench.spec.model)
    for target in TARGETS:
        bench.compiled(target, "fake-quant")
    bench.compiled(OWN, "cuda-int4")
    print(bench.table())


class Bench:
    """Rows, kept in a JSON file as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.spec = options, find_model("fashion-unet")
        assert self.spec.labels is not None and self.spec.conditions is not None
        self.labels = self.spec.labels(options.images, options.seed)
        self.cond, self.uncond = self.spec.conditions(options.images, options.seed)
        self.noise = initial_noise(options.images, self.spec.sample_shape(), options.seed)
        self.work = Path(tempfile.mkdtemp(prefix="tfqc-bench-"))
        self.config = {"images": options.images, "steps": options.steps, "seed": options.seed}
        stored = json.loads(options.out.read_text()) if options.out.exists() else {}
        self.rows: dict[str, Any] = stored["rows"] if stored.get("config") == self.config else {}
        self.reference: Tensor | None = None

    def compiled(self, target: str, backend: str) -> None:
        """The row of a target's pipeline, sampled with a backend."""
        key = target if backend == "fake-quant" else f"{target}, its own artifact"
        if key in self.rows:
            return
        parsed = tfqc.Target.parse(target)
        pipeline = parsed.backend.pipeline(parsed.options, "fold")
        runs = target if backend == "cuda-int4" else backend
        artifact = tfqc.compile(
            self.spec, runs, pipeline=pipeline, steps=self.options.steps, workdir=self.work / "trajectories"
        )
        self.row(key, load(artifact.save(self.work / str(len(self.rows)))))

    def row(self, key: str, denoiser: torch.nn.Module) -> None:
        """Sample and measure."""
        began = time.perf_counter()
        latents = sample(
            denoiser,
            self.spec.scheduler,
            steps=self.options.steps,
            latents=self.noise,
            cond=self.cond,
            uncond=self.uncond,
            guidance=self.spec.guidance,
            batch_size=self.options.batch_size,
        )
        images = self.spec.decode(latents)
        if self.reference is None:
            self.reference = images
        error = (images - self.reference).flatten(1).square().mean(1)
        self.rows[key] = {
            "psnr": None if key == "fp32" else float((-10 * error.clamp(min=1e-14).log10()).mean()),
            **{name: metric(images, self.labels) for name, metric in self.spec.metrics.items()},
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(key, json.dumps(self.rows[key]), flush=True)
        beside = self.options.out.with_suffix(".part")
        beside.write_text(json.dumps({"config": self.config, "rows": self.rows}, indent=1) + "\n")
        os.replace(beside, self.options.out)

    def table(self) -> str:
        """The rows as GitHub markdown."""
        lines = [
            [
                key,
                "-" if row["psnr"] is None else f"{row['psnr']:.2f}",
                f"{100 * row['class accuracy']:.1f}",
                f"{row['FD(fashion-cnn)']:.2f}",
            ]
            for key, row in self.rows.items()
        ]
        return tabulate(lines, ["target", "PSNR dB", "class acc. %", "FD"], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
