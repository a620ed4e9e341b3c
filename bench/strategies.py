"""What each maintenance strategy keeps: the built-in model at W8A8, W4A8 and W4A4, one row a strategy.

    python bench/strategies.py                 # 500 images, 50 DDIM steps; results in bench/results/strategies-500.json
    python bench/strategies.py --images 50     # a quick look

Every row samples the same seeds as the full-precision row. PSNR is between decoded images in 0..1, per image, averaged
over images in dB. Rows that are in the JSON file already, for the same settings, are not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

import tfqc
from tfqc.driver import load
from tfqc.frontend import capture
from tfqc.ir import parse
from tfqc.ir.interpret import Interpreter
from tfqc.models.find import find_model
from tfqc.models.spec import ModelSpec
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.loop import initial_noise, sample
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.temporal.disturbance import symptoms
from tfqc.temporal.features import tib_run

SETTINGS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
# Not strategies, for orientation. Plain PTQ: min-max, static, first and last layer like the others. TIB only: the naive
# block, the rest of the network in full precision.
PIPELINES = {
    "plain PTQ": "calibrate-weights{{bits={w}}},calibrate-activations{{bits={a}}}",
    "TIB only": "calibrate-weights{{bits={w} method=mse scope=tib}},calibrate-activations{{bits={a} scope=tib}}",
}
STRATEGIES = {
    **{name: name for name in PIPELINES},
    "naive": "tib",
    "FSC": "tib+fsc",
    "TIAR": "tib+tiar",
    "TIAR+FSC": "tib+tiar+fsc",
    "cache8": "cache8",
    "cache4": "cache4",
    "fold": "fold",
    "select": "select",
}
HERE = Path(__file__).parent


def main() -> None:
    """Compute the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--calibration-images", type=int, default=16)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--out", type=Path, help="default: bench/results/strategies-IMAGES.json")
    options = parser.parse_args()
    options.out = options.out or HERE / "results" / f"strategies-{options.images}.json"
    torch.set_grad_enabled(False)
    bench = Bench(options)
    bench.row("fp32", "-", None)
    for setting in options.settings:
        for strategy in options.strategies:
            bench.row(setting, strategy, STRATEGIES[strategy])
    print(bench.table())


class Bench:
    """Rows, kept in a JSON file as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.spec: ModelSpec = find_model("fashion-unet")
        assert self.spec.labels is not None and self.spec.conditions is not None
        self.labels = self.spec.labels(options.images, options.seed)
        self.cond, self.uncond = self.spec.conditions(options.images, options.seed)
        self.noise = initial_noise(options.images, self.spec.sample_shape(), options.seed)
        self.work = Path(tempfile.mkdtemp(prefix="tfqc-bench-"))
        self.reference: Tensor | None = None
        self.schedule = SamplingSchedule.of(self.spec.scheduler, options.steps)
        self.calibration = self.spec.calibration(options.calibration_images)
        self.programs: dict[str, tfqc.Program] = {}
        self.exact = self._exact_features()
        self.config = {k: getattr(options, k) for k in ("images", "steps", "seed", "calibration_images")}
        self.rows: dict[str, dict[str, Any]] = {}

    def row(self, setting: str, label: str, strategy: str | None) -> None:
        """One row: compile, sample, measure."""
        key = f"{setting} {label}"
        if self.options.out.exists():
            stored = json.loads(self.options.out.read_text())
            self.rows = stored["rows"] if stored["config"] == self.config else {}
        if key in self.rows and (strategy is not None or self._reference_path().exists()):
            if strategy is None:
                self.reference = torch.load(self._reference_path())
            return
        began = time.perf_counter()
        if strategy is None:
            denoiser, facts = self.spec.model, {"bytes": sum(p.numel() * 4 for p in self.spec.model.parameters())}
        else:
            denoiser, facts = self._compile(setting, label, strategy)
        compiled = time.perf_counter()
        twin = next((r for r in self.rows.values() if r.get("digest") == facts.get("digest", "none")), None)
        if twin is not None:  # the same bytes make the same images
            self.rows[key] = {**twin, **facts, "strategy": label, "sample_seconds": 0.0}
            self._save()
            return
        images = self._sample(denoiser)
        if strategy is None:
            self.reference = images
            torch.save(images, self._reference_path())
        assert self.reference is not None
        metrics = {name: metric(images, self.labels) for name, metric in self.spec.metrics.items()}
        error = (images - self.reference).flatten(1).square().mean(1)
        psnr = float((-10 * error.clamp(min=1e-14).log10()).mean()) if strategy else None
        self.rows[key] = {
            "setting": setting,
            "strategy": label,
            **facts,
            "psnr": psnr,
            **metrics,
            "compile_seconds": round(compiled - began, 1),
            "sample_seconds": round(time.perf_counter() - compiled, 1),
        }
        print(key, json.dumps(self.rows[key]), flush=True)
        self._save()

    def _reference_path(self) -> Path:
        name = "-".join(str(v) for v in self.config.values())
        return Path(tempfile.gettempdir()) / f"tfqc-bench-reference-{name}.pt"

    def _compile(self, setting: str, label: str, strategy: str) -> tuple[torch.nn.Module, dict[str, Any]]:
        weights, activations = SETTINGS[setting]
        target = tfqc.Target.parse(f"fake-quant{{weights={weights} activations={activations}}}")
        text = self._pipeline(setting, strategy) or target.backend.pipeline(target.options, strategy)
        start, rest = self._shared(setting, text)
        artifact = tfqc.compile(
            start,
            target,
            schedule=self.schedule,
            calibration=self.calibration,
            pipeline=rest,
            workdir=self.work / "trajectories",
        )
        directory = artifact.save(self.work / f"{setting}-{label}")
        tensors = {name: value for group in artifact.tensors.values() for name, value in group.items()}
        program = parse(artifact.texts["program.ir"], tensors)
        sizes = {p.name: p.stat().st_size for p in directory.iterdir() if p.suffix == ".safetensors"}
        files = [(directory / name).read_bytes() for name in ("model.py", "weights.safetensors")]
        facts = {
            "digest": hashlib.sha256(b"".join(files)).hexdigest(),
            "bytes": sizes["weights.safetensors"],
            "bytes_time": sizes.get("time.safetensors", 0),
            "operations": sum(n.op == "call_function" for n in program.step.nodes),
            **self._feature_error(program),
        }
        if strategy == "select":
            facts["selected"] = next(line for line in artifact.facts["report"] if "maintenance" in line)
        return load(directory), facts

    def _shared(self, setting: str, text: str) -> tuple[tfqc.Program, str]:
        """The program after the passes that all strategies of a setting have in common, and the rest of a pipeline.

        GPTQ does not touch the TIB, so it may run first, and once for all that plan the same.
        """
        passes = [str(p) for p in Pipeline.parse(text).passes]
        common = [
            p
            for p in passes
            if p.split("{")[0] in ("normalize", "discover-tib", "plan-quantization", "reconstruct-weights")
        ]
        key = ",".join(common)
        if key not in self.programs:
            program = capture(self.spec.model, self.spec.example_inputs, name=self.spec.name)
            context = Context(self.schedule, self.calibration, workdir=self.work / "trajectories")
            self.programs[key] = Pipeline.parse(key).run(program, context)
        return self.programs[key], ",".join(p for p in passes if p not in common)

    def _pipeline(self, setting: str, strategy: str) -> str | None:
        """The pipeline of a row that is no strategy's."""
        if strategy not in PIPELINES:
            return None
        weights, activations = SETTINGS[setting]
        quantizers = PIPELINES[strategy].format(w=weights, a=activations)
        start = "normalize,discover-tib,select-maintenance{strategy=tib}"
        return f"{start},{quantizers},fold-cache,hoist-request,insert-qdq"

    def _exact_features(self) -> dict[str, Tensor]:
        """Temporal features of the full-precision model, [T, 1, ...] by name."""
        program = capture(self.spec.model, self.spec.example_inputs)
        context = Context(schedule=self.schedule)
        Pipeline.parse("normalize,discover-tib").run(program, context)
        return tib_run(program, context)()

    def _feature_error(self, program: tfqc.Program) -> dict[str, Any]:
        """Symptoms of the features as the compiled program computes or reads them. Folded ones (part of a bias) are the
        exact values by construction, and the fold test holds them to that."""
        names = {n.name for n in program.step.nodes} & set(self.exact)
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        run = _Watch(program, seen)
        cond = {f"{k}": v[:1] for k, v in self.cond.items()}
        for t in self.schedule.timesteps:
            run(self.noise[:1], torch.tensor(int(t)), **cond)
        found = [
            symptoms(exact, torch.stack([v[:1] for v in seen[name]]) if name in names else exact)
            for name, exact in self.exact.items()
        ]
        cosine = torch.tensor([s.cosine for s in found], dtype=torch.float64)
        mismatch = torch.tensor([s.mismatch for s in found])
        return {
            "error_mean": float((1 - cosine).mean().clamp(min=0)),
            "cosine_worst": float(cosine.min()),
            "mismatch_share": float((mismatch != 0).double().mean()),
            "mismatch_worst": int(mismatch.abs().max()),
        }

    def _sample(self, denoiser: torch.nn.Module) -> Tensor:
        assert self.spec.decode is not None
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
        return self.spec.decode(latents)

    def _save(self) -> None:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        text = json.dumps({"config": self.config, "machine": machine, "rows": self.rows}, indent=1)
        beside = self.options.out.with_suffix(".part")
        beside.write_text(text + "\n")
        os.replace(beside, self.options.out)

    def table(self) -> str:
        """The rows as GitHub markdown."""
        head = ["", "strategy", "1 − cos, mean", "cos, worst", "δ ≠ 0", "PSNR dB", "class acc. %", "FD", "MB", "+ TIB"]
        lines: list[list[str]] = []
        order = ["fp32", *SETTINGS]
        for row in sorted(
            self.rows.values(),
            key=lambda r: (order.index(r["setting"]), ["-", *STRATEGIES].index(r["strategy"])),
        ):
            lines.append([
                row["setting"],
                row["strategy"],
                f"{row['error_mean']:.1e}" if "error_mean" in row else "-",
                f"{row['cosine_worst']:.6f}" if "error_mean" in row else "-",
                f"{100 * row['mismatch_share']:.1f}%" if "error_mean" in row else "-",
                "-" if row["psnr"] is None else f"{row['psnr']:.2f}",
                f"{100 * row['class accuracy']:.1f}",
                f"{row['FD(fashion-cnn)']:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bytes_time'] / 1e6:.2f}" if row.get("bytes_time") else "-",
            ])  # fmt: skip
        return tabulate(lines, head, tablefmt="github", disable_numparse=True)


class _Watch(Interpreter):
    """The program's interpretation, with some values of @step kept as they pass."""

    def __init__(self, program: tfqc.Program, seen: dict[str, list[Tensor]]) -> None:
        super().__init__(program)
        module = self._modules_by_name["step"]

        class Keeping(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n.name in seen:
                    seen[n.name].append(value)
                return value

        self._run = Keeping(module)

    def step(self, **values: Any) -> Any:
        """One timestep, node by node."""
        return self._run.run(*(values[name] for name in self._parameters_of["step"]))


if __name__ == "__main__":
    main()
