"""Train the small CNN that judges generated images, and record its features over the real test set.

    python bench/train_classifier.py            # about four CPU-minutes

Writes ``classifier/model.safetensors`` and ``classifier/reference.safetensors`` (mean and covariance of the
64 features over the 10,000 real test images, float64) under --out. Images are mirrored at random, as in the
denoiser's training, so that the judge does not mind which way a shoe points.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from train_fashion import DATA, ROOT, read_idx

from tfqc.models.zoo.fashion import Classifier
from tfqc.models.zoo.metrics import feature_statistics


def load(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 [N, 1, 28, 28] in [0, 1] and labels int64 [N]; ``split`` is "train" or "t10k"."""
    images = read_idx(data / f"{split}-images-idx3-ubyte.gz")[:, None] / 255
    return images, read_idx(data / f"{split}-labels-idx1-ubyte.gz").long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=ROOT / "tfqc/models/zoo/fashion-unet")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    images, labels = load(args.data, "train")
    model = Classifier()
    opt = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=6e-3, total_steps=steps)
    start = time.time()
    for epoch in range(args.epochs):
        total = 0.0
        for rows in torch.randperm(len(images)).split(args.batch)[: len(images) // args.batch]:
            x = images[rows]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            loss = F.cross_entropy(model(x), labels[rows], label_smoothing=0.05)
            loss.backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
            total += loss.item()
        loss_mean, seconds = total / (steps / args.epochs), time.time() - start
        print(f"epoch {epoch + 1}  loss {loss_mean:.4f}  {seconds:.0f} s", flush=True)

    model.eval()
    images, labels = load(args.data, "t10k")
    loader = zip(images.split(500), labels.split(500), strict=True)
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    print(f"test accuracy {hits / len(images):.4f}, {sum(p.numel() for p in model.parameters())} parameters")
    mean, covariance = feature_statistics(images, model)
    folder = args.out / "classifier"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_file({"mean": mean, "covariance": covariance}, folder / "reference.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    main()
