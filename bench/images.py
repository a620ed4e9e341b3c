"""A whole image by part: text encoders, denoiser, decoder; before and after `tfqc.quantize(pipe, parts="all")`.

    python bench/images.py sd15                 # 512 x 512; bench/results/images.json, the table in bench/README.md
    python bench/images.py sdxl                 # 1024 x 1024
    python bench/images.py sd15 --latent 16 --dry   # is it all there? prints, and writes nothing

Real architectures with random weights: time does not depend on what weights say. A few steps are run, with guidance
(two images a call of the denoiser), and the denoiser's share is that of one step, times --steps. Medians of rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from cpu_models import ARCHITECTURES
from tabulate import tabulate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import tfqc

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.integrations.parts import tokenizer  # noqa: E402

RESULTS, README = HERE / "results" / "images.json", HERE / "README.md"
BEGIN, END = "<!-- images -->\n", "<!-- end of images -->\n"
RUN = 2  # steps that are run
METHODS = {"text_encoder": "forward", "text_encoder_2": "forward", "unet": "forward", "vae": "decode"}
_SMALL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def main() -> None:
    """Measure one model, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["sd15", "sdxl"])
    parser.add_argument("--target", default="cpu-int8")
    parser.add_argument("--steps", type=int, default=30, help="of the image that is reckoned")
    parser.add_argument("--latent", type=int, help="another size: that of the latent, an eighth of the image's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        pipe = pipeline(options.model, Path(directory))
        size = 8 * (options.latent or ARCHITECTURES[options.model].latent)
        call = {"prompt": "a red fox", "height": size, "width": size, "output_type": "np"}
        before = measured(pipe, call, options.rounds)
        began = time.perf_counter()
        tfqc.quantize(pipe, options.target, steps=RUN, calibration=1, call={"height": size, "width": size}, parts="all")
        minutes = (time.perf_counter() - began) / 60
        gc.collect()
        after = measured(pipe, call, options.rounds)
    row = {
        "target": options.target, "size": size, "steps": options.steps, "cpu": cpu(),
        "threads": torch.get_num_threads(), "minutes": minutes, "before": before, "after": after,
    }  # fmt: skip
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {options.model: row} if options.dry else {**found, options.model: row}
    print(table(found))
    if not options.dry:
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        head, rest = README.read_text().split(BEGIN)
        README.write_text(head + BEGIN + table(found) + "\n" + END + rest.split(END)[1])


def pipeline(model: str, directory: Path) -> Any:
    """A complete pipeline with random weights in f32."""
    torch.manual_seed(0)
    words = tokenizer(directory)
    words.model_max_length = 77
    unet = diffusers.UNet2DConditionModel(**ARCHITECTURES[model].config).eval()
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=8 * ARCHITECTURES[model].latent,
    ).eval()  # fmt: skip
    first = CLIPTextModel(CLIPTextConfig(**_SMALL)).eval()
    if model == "sd15":
        made = diffusers.StableDiffusionPipeline(
            vae, first, words, unet, scheduler, None, None, requires_safety_checker=False
        )
    else:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**_LARGE, projection_dim=1280)).eval()
        made = diffusers.StableDiffusionXLPipeline(vae, first, second, words, words, unet, scheduler)
        made.vae.register_to_config(force_upcast=False)
    made.set_progress_bar_config(disable=True)
    return made


def measured(pipe: Any, call: dict[str, Any], rounds: int) -> dict[str, float]:
    """Seconds of each part: of text encoders and decoder for an image, of the denoiser for a step."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for name, method in METHODS.items():
        if (part := getattr(pipe, name, None)) is not None:
            vars(part)[method] = timed(getattr(part, method), seconds[name])
    images: list[dict[str, float]] = []
    for number in range(rounds + 1):
        pipe(**call, num_inference_steps=RUN, generator=torch.Generator().manual_seed(1))
        if number:  # the first one builds and records
            images.append({k: statistics.fmean(v) if k == "unet" else sum(v) for k, v in seconds.items() if v})
        for each in seconds.values():
            each.clear()
    for name, method in METHODS.items():
        if (part := getattr(pipe, name, None)) is not None:
            del vars(part)[method]
    return {name: statistics.median(image[name] for image in images) for name in images[0]}


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """The same function; seconds of each call are noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - began)

    return call


def table(found: dict[str, Any]) -> str:
    """Seconds of an image by part."""
    rows: list[list[Any]] = []
    for model, row in found.items():
        for when in ("before", "after"):
            its = row[when]
            text = its["text_encoder"] + its.get("text_encoder_2", 0.0)
            denoiser = row["steps"] * its["unet"]
            whole = text + denoiser + its["vae"]
            name = "torch, f32" if when == "before" else row["target"]
            rows.append([f"{model}, {row['size']}²", name, text, its["unet"], denoiser, its["vae"], whole])
        rows[-1].append(f"{rows[-2][-1] / rows[-1][-1]:.2f}")
    steps = next(iter(found.values()))["steps"]
    heads = ["", "", "text encoders", "a step", f"denoiser, {steps} steps", "decoder", "image", "times as fast"]
    text = tabulate(rows, heads, tablefmt="pipe", floatfmt=".2f")
    machines = " ".join(
        f"{m}: {r['cpu']}, {r['threads']} threads, compiled in {r['minutes']:.1f} minutes." for m, r in found.items()
    )
    return f"{text}\n\nSeconds. {machines}"


def cpu() -> str:
    """The CPU's name and what it multiplies integers with."""
    text = Path("/proc/cpuinfo").read_text()
    name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return f"{name} with {next((n for n in ('amx_int8', 'avx512_vnni', 'avx_vnni', 'avx2') if n in text), '?')}"


if __name__ == "__main__":
    main()
