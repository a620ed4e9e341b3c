"""What steps of activations learned as functions of time keep (TDQ), beside the other ways to find them.

    python bench/time_scales.py          # 64 images, 20 DDIM steps; results in bench/results/time-scales.json

The model that ships, temporal features folded, weights of 4 bits by GPTQ, the same for all rows of a setting; sampled
with the fake-quant backend. PSNR is to full precision on the same seeds, averaged over images. `at 31 steps`: the same
artifact, sampled with a schedule of which it knows hardly a timestep. Rows that are in the JSON file are not computed
again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import tfqc
from tfqc.driver import load
from tfqc.frontend import capture
from tfqc.models.find import find_model
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.loop import initial_noise, sample
from tfqc.sampling.schedule import SamplingSchedule

SETTINGS = {"W4A8": 8, "W4A4": 4}
WAYS = {
    "static min-max": "calibrate-activations{{bits={a}}}",
    "static MSE": "calibrate-activations{{bits={a} method=mse}}",
    "per-step min-max (FSC of the whole network)": "calibrate-activations{{bits={a} mode=per-step}}",
    "per-step MSE": "calibrate-activations{{bits={a} mode=per-step method=mse}}",
    "dynamic per token": "calibrate-activations{{bits={a} mode=per-token}}",
    "one step each, least error in outputs": "learn-time-scales{{bits={a} iterations=1 learning-rate=1e-9}},"
    "calibrate-activations{{bits={a}}}",
    "TDQ, full grid": "learn-time-scales{{bits={a}}},calibrate-activations{{bits={a}}}",
    "TDQ, released grid": "learn-time-scales{{bits={a} grid=released}},calibrate-activations{{bits={a}}}",
    "TDQ, full grid, looks at 7 steps": "learn-time-scales{{bits={a} steps=7}},calibrate-activations{{bits={a}}}",
}
START = "normalize,discover-tib,select-maintenance{strategy=fold},reconstruct-weights{bits=4},calibrate-weights{bits=4}"
OTHER_STEPS = 31
RESULTS = Path(__file__).parent / "results" / "time-scales.json"


def main(ways: Mapping[str, str] = WAYS, results: Path = RESULTS, about: str | None = __doc__) -> None:
    """Compute the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0] if about else "")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=Path, default=results)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", "The model was compiled for")
    bench = Bench(options, ways)
    for setting in SETTINGS:
        for way in ways:
            bench.row(setting, way)
    print(bench.table())


class Bench:
    """Rows, kept in a JSON file as they come."""

    def __init__(self, options: argparse.Namespace, ways: Mapping[str, str]) -> None:
        self.options, self.ways, self.spec = options, ways, find_model("fashion-unet")
        assert self.spec.labels is not None and self.spec.conditions is not None
        self.labels = self.spec.labels(options.images, options.seed)
        self.cond, self.uncond = self.spec.conditions(options.images, options.seed)
        self.noise = initial_noise(options.images, self.spec.sample_shape(), options.seed)
        self.work = Path(tempfile.mkdtemp(prefix="tfqc-bench-"))
        self.schedule = SamplingSchedule.of(self.spec.scheduler, options.steps)
        self.config = {"images": options.images, "steps": options.steps, "seed": options.seed}
        stored = json.loads(options.out.read_text()) if options.out.exists() else {}
        self.rows: dict[str, Any] = stored["rows"] if stored.get("config") == self.config else {}
        self.references: dict[int, Tensor] = {}
        self.start: tfqc.Program | None = None

    def row(self, setting: str, way: str) -> None:
        """Compile, sample with two schedules, measure."""
        key = f"{setting} {way}"
        if key in self.rows:
            return
        if self.start is None:  # weights do not depend on how activations are quantized
            self.start = capture(self.spec.model, self.spec.example_inputs, roles=self.spec.roles, name=self.spec.name)
            context = Context(self.schedule, self.spec.calibration(16), workdir=self.work / "trajectories")
            Pipeline.parse(START).run(self.start, context)
        began = time.perf_counter()
        artifact = tfqc.compile(
            self.start.clone(),
            "fake-quant",
            schedule=self.schedule,
            calibration=self.spec.calibration(16),
            pipeline=f"{self.ways[way].format(a=SETTINGS[setting])},fold-cache,hoist-request,insert-qdq",
            workdir=self.work / "trajectories",
        )
        seconds = time.perf_counter() - began
        directory = artifact.save(self.work / str(len(self.rows)))
        model = load(directory)
        self.rows[key] = {
            "setting": setting,
            "way": way,
            **self._measured(model, self.options.steps),
            "psnr at other steps": self._measured(model, OTHER_STEPS)["psnr"],
            "bytes": (directory / "weights.safetensors").stat().st_size,
            "bytes of @time": (directory / "time.safetensors").stat().st_size,
            "compile seconds": round(seconds, 1),
            "report": [line for line in artifact.facts["report"] if line.startswith(("learned", "BRECQ"))],
        }
        print(key, json.dumps(self.rows[key]), flush=True)
        beside = self.options.out.with_suffix(".part")
        beside.write_text(json.dumps({"config": self.config, "rows": self.rows}, indent=1) + "\n")
        os.replace(beside, self.options.out)

    def _measured(self, model: torch.nn.Module, steps: int) -> dict[str, Any]:
        if steps not in self.references:
            self.references[steps] = self._sampled(self.spec.model, steps)
        images = self._sampled(model, steps)
        error = (images - self.references[steps]).flatten(1).square().mean(1)
        metrics = {name: metric(images, self.labels) for name, metric in self.spec.metrics.items()}
        return {"psnr": float((-10 * error.clamp(min=1e-14).log10()).mean()), **metrics}

    def _sampled(self, model: torch.nn.Module, steps: int) -> Tensor:
        assert self.spec.decode is not None
        latents = sample(
            model,
            self.spec.scheduler,
            steps=steps,
            latents=self.noise,
            cond=self.cond,
            uncond=self.uncond,
            guidance=self.spec.guidance,
            batch_size=64,
        )
        return self.spec.decode(latents)

    def table(self) -> str:
        """The rows as GitHub markdown."""
        head = ["", "activations", "PSNR dB", "class acc. %", "FD", f"PSNR at {OTHER_STEPS} steps", "MB", "+ @time"]
        lines = [
            [
                row["setting"],
                row["way"],
                f"{row['psnr']:.2f}",
                f"{100 * row['class accuracy']:.1f}",
                f"{row['FD(fashion-cnn)']:.2f}",
                f"{row['psnr at other steps']:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bytes of @time'] / 1e6:.2f}",
            ]
            for row in (self.rows[f"{setting} {way}"] for setting in SETTINGS for way in self.ways)
        ]
        return tabulate(lines, head, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
