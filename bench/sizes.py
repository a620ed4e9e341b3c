"""How much memory and time does a model of real size take to be captured, folded and written?

    python bench/sizes.py                    # goes on where bench/results/sizes.json ends
    python bench/sizes.py --only sdxl        # anew

Real architectures with random weights, as diffusers writes them: bf16, in shards. Each is a process of its own, which
loads the folder, compiles it for twenty steps, and saves the artifact. Memory is the most that the process had in RAM
(VmHWM, pages of mapped files included), Python and torch with it, and the most of it that no file backs (RssAnon).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from cpu_models import ARCHITECTURES, random_weights, save_shards
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tabulate import tabulate

import tfqc
from tfqc.cli.progress import StderrProgress
from tfqc.models.examples import example_inputs

RESULTS = Path(__file__).parent / "results" / "sizes.json"
STEPS = 20
FOLD = "normalize,discover-tib,select-maintenance{strategy=fold},fold-cache"
# What becomes of each: weights as they are, with the time path folded; or weights in four bits, without calibration.
WAYS = {
    "folded": ("fake-quant", FOLD),
    "4-bit weights": (
        "fake-quant{weights=4 activations=none group=64}",
        "normalize,discover-tib,plan-quantization{weights=4 activations=none method=min-max group=64},"
        "select-maintenance{strategy=fold},calibrate-weights,fold-cache,insert-qdq",
    ),
}

MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sd15": (ARCHITECTURES["sd15"].cls, ARCHITECTURES["sd15"].config or {}),
    "sdxl": (ARCHITECTURES["sdxl"].cls, ARCHITECTURES["sdxl"].config or {}),
    "pixart-sigma": (
        "PixArtTransformer2DModel",
        {
            "sample_size": 128, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
            "out_channels": 8, "cross_attention_dim": 1152, "caption_channels": 4096, "patch_size": 2,
            "interpolation_scale": 2, "use_additional_conditions": False,
        },
    ),
    "sd35-medium": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "num_attention_heads": 24,
            "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "out_channels": 16,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
}  # fmt: skip


def main() -> None:
    """Compute what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=[], help="compute these anew")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tfqc-sizes", help="for the folders")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, way = options.one
        print(json.dumps(measured(options.work / model, *WAYS[way])))
        return
    rows: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in options.only or MODELS:
        for way in options.ways:
            key = f"{model}, {way}"
            if key in rows and not options.only:
                continue
            folder = options.work / model
            make(folder, *MODELS[model])
            print(f"{key} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--work", str(options.work), "--one", model, way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[key] = json.loads(done.stdout.splitlines()[-1])
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        if options.only == []:
            shutil.rmtree(options.work / model)
    print(table(rows))


def make(folder: Path, cls: str, config: Mapping[str, Any]) -> None:
    """Write a folder of random bf16 weights, if it is not there yet."""
    if folder.is_dir():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with accelerate.init_empty_weights():
        model = getattr(diffusers, cls).from_config(dict(config))
    model.save_config(part)
    save_shards(((name, value.bfloat16()) for name, value in random_weights(model)), part)
    part.rename(folder)


def measured(folder: Path, target: str, pipeline: str) -> dict[str, float]:
    """Compile one folder here and now; GiB and seconds."""
    peak = _Peak()
    began = time.monotonic()
    cls = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    model = cls.from_pretrained(folder, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
    loaded = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder.parent) as directory:
        artifact = tfqc.compile(
            model, target, schedule=DDIMScheduler(), steps=STEPS, calibration=1, pipeline=pipeline,
            example_inputs=example_inputs(model), progress=StderrProgress(),
        )  # fmt: skip
        compiled = time.monotonic()
        where = artifact.save(Path(directory) / "artifact")
        size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
    return {
        "weights": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30,
        "artifact": size / 2**30,
        "peak": peak.all_of_it() / 2**30,
        "anonymous": peak.anonymous / 2**30,
        "load": loaded - began,
        "compile": compiled - loaded,
        "save": time.monotonic() - compiled,
    }


class _Peak:
    """Watches this process; bytes."""

    def __init__(self) -> None:
        self.anonymous = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def all_of_it(self) -> int:
        """The most that was in RAM at a time."""
        return _status("VmHWM")

    def _watch(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, _status("RssAnon"))
            time.sleep(0.05)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each model and way."""
    cells = [
        [
            name,
            f"{row['weights']:.2f}",
            f"{row['artifact']:.2f}",
            f"{row['peak']:.2f}",
            f"{row['anonymous']:.2f}",
            f"{row['peak'] / row['weights']:.2f}",
            f"{(row['load'] + row['compile'] + row['save']) / 60:.1f}",
        ]
        for name, row in rows.items()
    ]
    head = ["", "weights, GiB", "artifact", "peak", "of it anonymous", "peak / weights", "minutes"]
    return tabulate(cells, headers=head, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
