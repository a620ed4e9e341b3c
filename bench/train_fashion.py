"""Train the class-conditional Fashion-MNIST denoiser that ships in ``tfqc/models/zoo/fashion-unet``.

A small model in the shape of Stable Diffusion: a ``UNet2DConditionModel`` on 4x16x16 "latents" (the 28x28
image padded to 32x32, then ``pixel_unshuffle(2)``), the label as four tokens read by cross-attention, so that
the time path depends on the timestep alone. v-prediction, cosine schedule, 10% label dropout for
classifier-free guidance, EMA weights.

    python bench/train_fashion.py --minutes 30            # start, or go on from the checkpoint
    python bench/train_fashion.py --minutes 30 --fresh    # ignore the checkpoint

The learning rate follows the wall clock (warm-up, flat, cosine to zero), so a run of any length ends
annealed. Every few minutes the EMA weights are exported to --out (fp16, diffusers' folder layout) and a
checkpoint goes to --checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tfqc.models.zoo.fashion import UNCONDITIONAL, LabelTokens, encode

ROOT = Path(__file__).resolve().parent.parent
DATA = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    # Narrow where there are 256 positions, wide where there are 16: most weights sit where they cost least.
    "block_out_channels": (32, 64, 160),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 2,  # the *number* of heads in this class of diffusers, whatever the name says
    "norm_num_groups": 8,  # 32 groups of 32 channels would forget every channel's mean, as an instance norm
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    # The cosine schedule ends at alpha_bar = 2.4e-9: the last step is pure noise already, so nothing needs
    # rescaling, and "trailing" makes samplers start exactly there ("leading" would start at t = 980).
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "trailing",
    "clip_sample": False,  # as Stable Diffusion: the sampler stays linear in the model's output
    "set_alpha_to_one": True,
}


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes (images [N, 28, 28] or labels [N]) as uint8."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = np.frombuffer(raw, ">u4", ndim, 4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy())


class Denoiser(nn.Module):
    """The UNet and its label tokens, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET)
        self.tokens = LabelTokens(n_tokens=4, dim=UNET["cross_attention_dim"])

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states=self.tokens(labels)).sample


def learning_rate(progress: float, peak: float) -> float:
    """Warm up over the first 2% of the run, stay, then decay by a cosine over the last 60%."""
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.4) / 0.6)))
    return peak * min(1.0, progress / 0.02 + 1e-3) * decay


def save_checkpoint(
    path: Path, model: nn.Module, ema: nn.Module, opt: torch.optim.Optimizer, done: tuple[int, float]
) -> None:
    """One safetensors file: weights, EMA weights, Adam's moments; steps and seconds done in the metadata."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for name, p in model.named_parameters():
        tensors |= {f"adam.{key}.{name}": v for key, v in opt.state[p].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".tmp"), {"done": json.dumps(done)})
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, opt: torch.optim.Optimizer) -> tuple[int, float]:
    """Undo `save_checkpoint`; returns steps and seconds done."""
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    ema.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    for name, p in model.named_parameters():
        opt.state[p] = {key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    with safe_open(path, "pt") as f:
        step, seconds = json.loads(f.metadata()["done"])
    return step, seconds


def export(ema: Denoiser, out: Path) -> None:
    """Write the EMA weights as fp16 in diffusers' folder layout, by renames: others may be reading."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp_name:
        tmp = Path(tmp_name)
        half = UNet2DConditionModel(**UNET)
        half.load_state_dict(ema.unet.state_dict())
        half.half().save_pretrained(tmp / "unet")
        DDIMScheduler(**SCHEDULER).save_pretrained(tmp / "scheduler")
        (tmp / "tokens").mkdir()
        config = {
            "_class_name": "LabelTokens",
            "n_tokens": ema.tokens.n_tokens,
            "dim": ema.tokens.dim,
            "n_labels": 11,
        }
        (tmp / "tokens" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.half() for k, v in ema.tokens.state_dict().items()}, tmp / "tokens" / "model.safetensors")
        index = {
            "_class_name": "DiffusionPipeline",  # the base: no pipeline of diffusers has label tokens
            "unet": ["diffusers", "UNet2DConditionModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "tokens": ["tfqc.models.zoo.fashion", "LabelTokens"],
            "classifier": ["tfqc.models.zoo.fashion", "Classifier"],
        }
        (tmp / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for file in tmp.rglob("*.*"):
            if file.is_file():
                target = out / file.relative_to(tmp)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.chmod(0o644)  # safetensors writes 0600, which would ship
                os.replace(file, target)


def batches(
    images: Tensor, labels: Tensor, size: int, seed: int, rank: int, workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """This worker's rows of endless shuffled batches, each image mirrored with probability 1/2."""
    g = torch.Generator().manual_seed(seed)  # the same on every worker: they cut the same batches
    while True:
        for rows in torch.randperm(len(images), generator=g).split(size)[:-1]:
            rows = rows[rank::workers]
            x = images[rows]
            x = torch.where(torch.rand(len(rows), 1, 1) < 0.5, x.flip(2), x)
            yield encode(x[:, None] / 255), labels[rows].long()


def average_(grads: list[Tensor], *numbers: float) -> list[float]:
    """Average over the workers: gradients in place, and numbers, on which all workers then agree."""
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor(numbers)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, tail = flat.split([*(g.numel() for g in grads), len(numbers)])
    for g, part in zip(grads, parts, strict=True):
        g.copy_(part.view_as(g))
    return tail.tolist()


def work(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One single-threaded worker; rank 0 also keeps the EMA, the log, the checkpoint and the export.

    Data parallel over processes rather than threads: they meet once per step and not at every operator, and
    do not stall when somebody else uses a core (two OpenMP threads did: 15 s instead of 0.3 s per step).
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.workers)
    torch.manual_seed(0)
    model = Denoiser()
    # CPU flash attention is slow backwards in bf16 (28% of a step); plain matrix products are not.
    model.unet.set_attn_processor(AttnProcessor())
    ema = Denoiser().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step, seconds = 0, 0.0
    if args.checkpoint.exists() and not args.fresh:
        step, seconds = load_checkpoint(args.checkpoint, model, ema, opt)
    dist.barrier()  # nobody may write the log or a checkpoint before all have read

    log = (ROOT / "bench/train_fashion.log").open("a" if step else "w") if rank == 0 else None

    def say(text: str) -> None:
        if log:
            print(text, flush=True)
            print(text, file=log, flush=True)

    parameters = list(model.parameters())
    say(
        f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, from step {step}, batch {args.batch}, "
        f"lr {args.lr:g}, {args.minutes:g} minutes, {args.workers} workers, bf16 autocast"
    )
    images, labels = (read_idx(args.data / f"train-{k}-ubyte.gz") for k in ("images-idx3", "labels-idx1"))
    alpha_bar = DDIMScheduler(**SCHEDULER).alphas_cumprod
    total, started = args.minutes * 60, time.time() - seconds
    losses, said, said_step, saved = [], seconds, step, seconds
    torch.manual_seed(1 + step * args.workers + rank)
    for x0, label in batches(images, labels, args.batch, step, rank, args.workers):
        if seconds >= total:
            break
        t = torch.randint(0, len(alpha_bar), (len(x0),))
        noise, a = torch.randn_like(x0), alpha_bar[t].view(-1, 1, 1, 1)
        x_t, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        label = torch.where(torch.rand(len(label)) < 0.1, UNCONDITIONAL, label)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x_t, t, label)
        loss = F.mse_loss(out.float(), v)
        loss.backward()
        mean_loss, seconds = average_([p.grad for p in parameters], loss.item(), time.time() - started)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in opt.param_groups:
            group["lr"] = learning_rate(seconds / total, args.lr)
        opt.step()
        opt.zero_grad()
        step += 1
        losses.append(mean_loss)
        if rank:
            continue
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - decay)
        if seconds - said > 60:
            say(
                f"{seconds / 60:5.1f} min  step {step:6d}  loss {sum(losses) / len(losses):.4f}  "
                f"{(seconds - said) / (step - said_step) / args.batch * 1e3:.2f} ms/image  "
                f"{(total - seconds) / 60:.1f} min to go"
            )
            losses, said, said_step = [], seconds, step
        if seconds - saved > 240:
            save_checkpoint(args.checkpoint, model, ema, opt, (step, seconds))
            export(ema, args.out)
            saved = seconds
    if rank == 0:
        if losses:
            save_checkpoint(args.checkpoint, model, ema, opt, (step, seconds))
        export(ema, args.out)
        say(f"exported step {step}, {step * args.batch} images seen")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="total training time, over all resumptions")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tfqc/models/zoo/fashion-unet", help="where the model is exported"
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build/train_fashion.safetensors")
    parser.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    parser.add_argument("--batch", type=int, default=64, help="over all workers")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        mp.spawn(work, (args, f"{tmp}/rendezvous"), nprocs=args.workers)


if __name__ == "__main__":
    main()
