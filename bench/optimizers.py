"""Adam's moments in few bits: does training end where it ends in 32 bits?

    python bench/optimizers.py            # bench/results/optimizers.json, the table in bench/README.md

Two tasks, each with the same batches for all: the model that ships, trained from its first step (Debian's
`dataset-fashion-mnist`), and TIAR on it at W4. Loss is the mean over the last tenth of the steps (TIAR: of the
reconstructed weights), bytes are those that the states hold.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from tabulate import tabulate
from torch.utils._pytree import tree_leaves
from train_fashion import DATA, SCHEDULER, UNCONDITIONAL, Denoiser, batches, learning_rate, read_idx

from tfqc.frontend import capture
from tfqc.models.find import find_model
from tfqc.optim import STQuantAdam
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.schedule import SamplingSchedule

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "optimizers.json", HERE / "README.md"
BEGIN, END = "<!-- optimizers -->\n", "<!-- end of optimizers -->\n"
STEPS, BATCH, RATE = 600, 32, 8e-4
OPTIONS: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.99), "weight_decay": 0.01}


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """By the name of a row; torchao's where it is installed."""
    found: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW, float32": lambda p: torch.optim.AdamW(p, **OPTIONS),
        "STQuantAdam": lambda p: STQuantAdam(p, **OPTIONS),
        "STQuantAdam, 4 bits throughout": lambda p: STQuantAdam(p, every=10**9, **OPTIONS),
    }
    try:
        from torchao.optim import AdamW4bit, AdamW8bit
    except ImportError:
        return found
    return found | {
        "torchao AdamW8bit": lambda p: AdamW8bit(p, **OPTIONS),
        "torchao AdamW4bit": lambda p: AdamW4bit(p, **OPTIONS),
    }


def trained(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, float]:
    """Loss, bits of a value of a moment, and milliseconds of the optimizer's step (the median)."""
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = make(model.parameters())
    images, labels = (read_idx(DATA / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    alpha_bar = DDIMScheduler(**SCHEDULER).alphas_cumprod
    losses, seconds = list[float](), list[float]()
    torch.manual_seed(1)
    for step, (x0, label) in zip(range(STEPS), batches(images, labels, BATCH, 0, 0, 1), strict=False):
        t = torch.randint(0, len(alpha_bar), (len(x0),))
        noise, a = torch.randn_like(x0), alpha_bar[t].view(-1, 1, 1, 1)
        noisy, wanted = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        label = torch.where(torch.rand(len(label)) < 0.1, UNCONDITIONAL, label)
        loss = F.mse_loss(model(noisy, t, label), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            rate = learning_rate((step + 1) / STEPS, RATE)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-STEPS // 10 :]
    return {"loss": sum(last) / len(last), "bits": bits(optimizer), "ms": 1e3 * statistics.median(seconds)}


def bits(optimizer: torch.optim.Optimizer) -> float:
    """Of a value of a moment: of all bytes that are held for parameters that have been moved."""
    if isinstance(optimizer, STQuantAdam):
        return optimizer.bits()
    held = values = 0
    for param, state in optimizer.state.items():
        values += 2 * param.numel()
        for key in ("exp_avg", "exp_avg_sq"):
            moment = state[key]
            parts = [getattr(moment, n) for n in getattr(moment, "tensor_attrs", [])] or [moment]
            held += sum(t.nbytes for t in tree_leaves(parts) if isinstance(t, torch.Tensor))
    return 8 * held / values


def reconstructed(optimizer: str) -> dict[str, float]:
    """TIAR's losses on the model that ships, at W4: of rounding to nearest, and reconstructed."""
    spec = find_model("fashion-unet")
    program = capture(spec.model, spec.example_inputs, roles=spec.roles, name=spec.name)
    context = Context(schedule=SamplingSchedule.of(spec.scheduler, 20))
    passes = f"normalize,discover-tib,reconstruct-tib{{bits=4 iterations=1000 optimizer={optimizer}}}"
    Pipeline.parse(passes).run(program, context)
    (said,) = (r for r in context.remarks if r.kind in ("reconstructed", "not-reconstructed"))
    return {name: float(said.numbers[name]) for name in ("nearest", "reconstructed")}


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    base = found["training"]["AdamW, float32"]["loss"]
    rows = [
        [name, f"{r['bits']:.2f}", f"{r['loss']:.4f}", f"{r['loss'] / base - 1:+.2%}", f"{r['ms']:.0f}"]
        for name, r in found["training"].items()
    ]
    heads = ["training", "bits of a value", "loss", "beside float32", "ms of the optimizer a step"]
    tiar = [
        [name, f"{r['nearest']:.4g}", f"{r['reconstructed']:.4g}"] for name, r in found["TIAR"].items()
    ]  # fmt: skip
    return "\n\n".join(
        (tabulate(rows, heads, "github", disable_numparse=True),
         tabulate(tiar, ["TIAR, W4", "loss, nearest", "loss, reconstructed"], "github", disable_numparse=True))
    )  # fmt: skip


def main() -> None:
    """Rows that are missing are computed, and kept at once."""
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"TIAR": {}, "training": {}}
    work: list[tuple[str, str, Callable[[], dict[str, float]]]] = [
        *(("TIAR", name, functools.partial(reconstructed, name)) for name in ("adam", "stquant")),
        *(("training", name, functools.partial(trained, make)) for name, make in optimizers().items()),
    ]
    for task, name, compute in work:
        if name not in found[task]:
            found[task][name] = compute()
            print(task, name, found[task][name], flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    head, rest = README.read_text().split(BEGIN)
    README.write_text(head + BEGIN + "\n" + table(found) + "\n\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
