"""Where the time of one step goes, for each kernel and shape, beside the floor; and how long a whole image takes.

    python bench/cpu_profile.py sdxl                # a table; bench/results/cpu-profile-sdxl.json
    python bench/cpu_profile.py sdxl --image 30     # also 30 steps with guidance, batch 2, everything in it

The floor of an operation is the larger of operations / peak and bytes / bandwidth. Bandwidth is measured here, by a
copy in memory; the peak is that of the matrix unit or dot product instructions alone, as --peak says (8-bit TOPS
of all cores; attention multiplies in 16 bits, at half of it). Artifacts are those of `cpu.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cpu_models import ARCHITECTURES, Case
from cpu_peers import Tfqc
from diffusers import DDIMScheduler
from tabulate import tabulate

import tfqc

HERE = Path(__file__).parent


def main() -> None:
    """Profile one step, and time an image if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", choices=ARCHITECTURES)
    parser.add_argument("--target", default="cpu-int8")
    parser.add_argument("--latent", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peak", type=float, default=12.8, help="TOPS of 8-bit products on all cores; 12.8 is AMX here"
    )
    parser.add_argument("--image", type=int, metavar="STEPS")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tfqc-bench-cpu")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    latent = options.latent or ARCHITECTURES[options.model].latent
    case = Case(options.model, options.batch, latent, options.work)
    peer = Tfqc(options.target)
    if not peer.prepared(case).exists():
        peer.prepare(case)
    began = time.perf_counter()
    model: Any = tfqc.load(peer.prepared(case))
    result: dict[str, Any] = {"model": options.model, "batch": options.batch, "latent": latent, "isa": model.isa}
    result |= {"load_seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}
    result |= _profile(model, case.inputs(), options.rounds, options.peak * 1e12, _bandwidth())
    if options.image:
        result["image"] = _image(model, replace(case, batch=2).inputs(), options.image)
    path = HERE / "results" / f"cpu-profile-{options.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    columns = ("kernel", "shape", "count", "ms", "TOPS", "floor_ms", "gap")
    rows = [[row[c] for c in columns] for row in result["rows"][:40]]
    print(tabulate(rows, columns, floatfmt=".2f"))
    print(tabulate(sorted(result["kernels"].items(), key=lambda x: -x[1]), ("kernel", "ms"), floatfmt=".1f"))
    print({k: v for k, v in result.items() if k not in ("rows", "kernels")})


def _bandwidth() -> float:
    """Bytes that a copy reads and writes in a second."""
    a, b = torch.empty(1 << 28, dtype=torch.uint8), torch.empty(1 << 28, dtype=torch.uint8)
    times: list[float] = []
    for _ in range(7):
        began = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - began)
    return 2 * a.numel() / min(times)


def _profile(model: Any, inputs: dict[str, Any], rounds: int, peak: float, bandwidth: float) -> dict[str, Any]:
    steps: list[float] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        model(**inputs)
        steps.append(time.perf_counter() - began)
    (schedule,) = model._recordings.values()
    groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    kernels: dict[str, float] = defaultdict(float)
    for line, seconds in schedule.profile(dict(schedule.inputs), rounds):
        shape, products, size = _work(line)
        rate = peak / 2 if line.kernel == "attention" else peak
        group = groups[line.kernel, shape]
        group[0] += 1
        group[1] += seconds
        group[2] += 2 * products
        group[3] += max(2 * products / rate, size / bandwidth)
        kernels[line.kernel] += seconds * 1e3
    rows = [
        {
            "kernel": kernel, "shape": shape, "count": count, "ms": seconds * 1e3, "TOPS": work / seconds / 1e12,
            "floor_ms": floor * 1e3, "gap": seconds / floor,
        }
        for (kernel, shape), (count, seconds, work, floor) in groups.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: -row["ms"])
    return {
        "step_ms": sorted(steps[1:])[rounds // 2] * 1e3, "sum_ms": sum(kernels.values()), "rows": rows,
        "floor_ms": sum(row["floor_ms"] for row in rows), "kernels": dict(kernels), "bandwidth": bandwidth,
        "peak": peak, "arena_bytes": schedule.arena_bytes, "reorders": schedule.reorders,
    }  # fmt: skip


def _work(line: Any) -> tuple[str, int, int]:
    """The shape of a line as text, its products, and the bytes that it reads and writes at least."""
    a, out = line.args, line.made.numel() * line.made.element_size()
    match line.kernel:
        case "linear":
            rows = a.batch * a.seq
            return f"{rows}x{a.k} -> {a.n}", rows * a.k * a.n, rows * a.k + a.k * a.n + out
        case "conv":
            taps, pixels = a.kh * a.kw * a.c // a.groups, a.batch * a.out_h * a.out_w
            shape = f"{a.kh}x{a.kw} {a.c}@{a.h}x{a.w} -> {a.n}" + ("" if a.stride == 1 else f" /{a.stride}")
            return shape, pixels * taps * a.n, a.batch * a.h * a.w * a.c + taps * a.n + out
        case "attention":
            pairs = a.batch * a.heads * a.queries * a.keys
            read = 2 * a.batch * a.heads * (a.queries + 2 * a.keys) * a.d
            return f"{a.heads} heads {a.queries}x{a.keys} d={a.d}", 2 * pairs * a.d, read + out
        case _:
            return "x".join(map(str, line.made.shape)), 0, 2 * out


def _image(model: Any, inputs: dict[str, Any], steps: int) -> dict[str, float]:
    """Seconds of a whole image with guidance, everything in it; unknown timesteps get their rows on the way."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    name = next(k for k in inputs if k in ("sample", "hidden_states"))
    began = time.perf_counter()
    latents = inputs[name][:1]
    times: list[float] = []
    for t in scheduler.timesteps:
        start = time.perf_counter()
        both = model(**{**inputs, name: latents.expand(2, -1, -1, -1), "timestep": t})[0]
        uncond, cond = both[:, :4].chunk(2)
        latents = scheduler.step(uncond + 5 * (cond - uncond), t, latents).prev_sample
        times.append(time.perf_counter() - start)
    assert bool(torch.isfinite(latents).all())
    median = sorted(times)[len(times) // 2]
    return {"seconds": time.perf_counter() - began, "first_step": times[0], "median_step": median, "steps": steps}


if __name__ == "__main__":
    main()
