"""How good and how fast is the shipped Fashion-MNIST denoiser? Prints the numbers of its model card.

    python bench/evaluate_fashion.py --images 1000 --grid grid.png     # ten minutes on two busy cores
    python bench/evaluate_fashion.py --images 0                        # speed only

Also prints the Fréchet distance of as many real *training* images: what a perfect generator would score at
this number of images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from train_classifier import load
from train_fashion import DATA

from tfqc.models.zoo import fashion
from tfqc.models.zoo.metrics import class_accuracy, fd_fashion_cnn
from tfqc.sampling.loop import initial_noise, sample


def chunk(rows: tuple[int, int], steps: int, guidance: float, seed: int) -> Tensor:
    """Images ``rows[0]`` to ``rows[1]`` of the endless series of ``seed``, labels 0..9 in turn."""
    torch.set_num_threads(1)
    first, last = rows
    tokens, labels = fashion.load_tokens(), torch.arange(first, last) % 10
    latents = sample(
        fashion.load_unet(),
        fashion.load_scheduler(),
        steps=steps,
        latents=initial_noise(last, fashion.LATENT_SHAPE, seed)[first:],
        cond={"encoder_hidden_states": tokens(labels)},
        uncond={"encoder_hidden_states": tokens(torch.full_like(labels, fashion.UNCONDITIONAL))},
        guidance=guidance,
    )
    return fashion.decode(latents)


def generate(n: int, steps: int, guidance: float, seed: int, workers: int) -> Tensor:
    """n images [n, 1, 28, 28] in [0, 1], by single-threaded processes (why: see ``train_fashion.work``)."""
    start, parts = time.time(), list[Tensor]()
    spans = [(first, min(first + 50, n)) for first in range(0, n, 50)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for part in pool.imap(partial(chunk, steps=steps, guidance=guidance, seed=seed), spans):
            parts.append(part.clone())
            left = (time.time() - start) / len(parts) * (len(spans) - len(parts))
            print(f"{len(parts)}/{len(spans)} chunks, {left:.0f} s to go", file=sys.stderr, flush=True)
    return torch.cat(parts)


def forward_ms(batch: int) -> float:
    """Least milliseconds of a forward of ``batch`` rows, over 3 seconds: more is other people's load."""
    unet, x = fashion.load_unet(), torch.randn(batch, *fashion.LATENT_SHAPE)
    tokens = torch.randn(batch, 4, 128)
    times: list[float] = []
    with torch.no_grad():
        while len(times) < 5 or sum(times) < 3:
            start = time.perf_counter()
            unet(x, torch.tensor(500), encoder_hidden_states=tokens)
            times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--grid", type=Path, help="write the first 100 images here, a class per column")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for batch in (1, 64, 128):
        ms = forward_ms(batch)
        print(f"batch {batch:3d}: {ms:7.2f} ms per forward, {ms / batch:5.2f} ms per image")
    if not args.images:
        return
    start = time.time()
    images = generate(args.images, args.steps, args.guidance, args.seed, args.threads)
    labels = torch.arange(args.images) % 10
    print(
        f"{args.images} images, {args.steps} DDIM steps, guidance {args.guidance:g}, seed {args.seed}, ",
        end="",
    )
    print(f"{time.time() - start:.0f} s on {args.threads} processes")
    print(f"generated: class accuracy {class_accuracy(images, labels):.4f}, FD {fd_fashion_cnn(images):.3f}")
    real, real_labels = load(args.data, "train")
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    accuracy, fd = class_accuracy(real[rows], real_labels[rows]), fd_fashion_cnn(real[rows])
    print(f"real (train set): class accuracy {accuracy:.4f}, FD {fd:.3f}")
    if args.grid:
        tiles = images[:100].view(-1, 10, 28, 28).permute(0, 2, 1, 3).reshape(-1, 280)
        Image.fromarray((tiles * 255).round().byte().numpy()).resize((840, 84 * len(images[:100:10]))).save(args.grid)


if __name__ == "__main__":
    main()
