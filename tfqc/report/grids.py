"""Images in rows and columns with labels, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK = (255, 255, 255), (60, 60, 60)
GAP, BLOCK_GAP, MARGIN = 4, 18, 12
CELL = 84  # height in pixels that a small image is enlarged to, by a whole factor


def image_grid(
    rows: Sequence[Tensor],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    block: int = 0,
) -> Image.Image:
    """One picture from rows of images.

    Args:
        rows: [N, C, H, W] each, values 0..1 (others are clamped), C = 1 or 3; rows may have different N.
        row_labels: left of the rows. column_labels: above the columns.
        block: this many rows stand closer together, 0 = all.
    """
    height, width = rows[0].shape[-2:]
    factor = max(1, CELL // height)
    height, width = height * factor, width * factor
    font = ImageFont.load_default(13)
    left = MARGIN + max((int(font.getlength(text)) + 10 for text in row_labels), default=0)
    top = MARGIN + (20 if column_labels else 0)
    tops = [top + i * (height + GAP) + (i // block * (BLOCK_GAP - GAP) if block else 0) for i in range(len(rows))]
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + columns * (width + GAP) - GAP + MARGIN, tops[-1] + height + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, text in enumerate(column_labels[:columns]):
        pen.text((left + i * (width + GAP) + width // 2, top - 6), text, INK, font, anchor="ms")
    for i, text in enumerate(row_labels[: len(rows)]):
        pen.text((left - 10, tops[i] + height // 2), text, INK, font, anchor="rm")
    for y, row in zip(tops, rows, strict=True):
        for i, image in enumerate(row):
            cell = _to_image(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left + i * (width + GAP), y))
    return canvas


def tiled_channels(latents: Tensor) -> Tensor:
    """Latents [N, C, H, W] as grey images [N, 1, H, C*W + gaps]: channels side by side, each scaled to 0..1."""
    low, high = latents.amin((2, 3), keepdim=True), latents.amax((2, 3), keepdim=True)
    scaled = (latents - low) / (high - low).clamp(min=1e-12)
    line = torch.ones(len(latents), 1, latents.shape[2], 1)
    parts = [part for channel in scaled.split(1, dim=1) for part in (channel, line)]
    return torch.cat(parts[:-1], dim=3)


def difference(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """|a − b| scaled so that its largest value is white (1), and the factor."""
    error = (a - b).abs()
    peak = float(error.max())
    factor = 1 / peak if peak > 0 else 1.0
    return error * factor, factor


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture; the format is the suffix's, PNG without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format=None if path.suffix else "PNG")
    return path


def _to_image(image: Tensor) -> Image.Image:
    """[C, H, W] in 0..1 as an RGB picture."""
    values = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    values = values.expand(3, -1, -1) if values.shape[0] == 1 else values[:3]
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy(), "RGB")
