"""What a pipeline is run with for calibration: prompts, a file of them, images, latents, arguments of its own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_text
from tfqc.frontend.inputs import SAMPLE_NAMES, TIME_NAMES, parameters_of

# Things, people, places, styles, text, few words and many: what a network is asked for.
DEFAULT = (
    "a photograph of a red fox in the snow, soft morning light",
    "portrait of an old fisherman, oil painting, thick brush strokes",
    "a bowl of oranges on a wooden table",
    "aerial view of a city at night, long exposure",
    "a watercolour of a lighthouse on a cliff, storm clouds",
    "two children running through a field of sunflowers",
    "isometric drawing of a small library, pastel colours",
    "a hand-written sign that says OPEN in a shop window",
)
COUNT = 4  # of them, where nothing is said

Prompts = int | str | Path | Tensor | Iterable[str] | Iterable[Mapping[str, Any]] | None

_SAYS_WHAT = ("prompt", "prompt_embeds")  # beside one of these there is no place for a default prompt
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MASK = ".mask"


def runs_of(
    pipe: Any, given: Prompts, common: Mapping[str, Any], seed: int, whole: bool = False
) -> list[dict[str, Any]]:
    """Keyword arguments of a pipeline for each of its runs; each has a generator of its own.

    Args:
        given: how many of the default prompts, prompts, the Path of a file with a prompt in each line or of a folder of
            images, latents [N, ...], or keyword arguments for each run.
        common: keyword arguments of all runs.
        whole: up to the image, not to its latents.

    Raises:
        CalibrationError: there are none, or the pipeline does not take such arguments.
    """
    takes = inspect.signature(pipe.__call__).parameters
    own = _listed(given, "prompt" in takes and not any(common.get(name) is not None for name in _SAYS_WHAT))
    if not own:
        raise CalibrationError("Calibration needs at least one run of the pipeline: there are no prompts.")
    usual = {"output_type": "np" if whole else "latent", "return_dict": False}
    runs: list[dict[str, Any]] = []
    for number, mine in enumerate(own):
        run = {**{k: v for k, v in usual.items() if k in takes}, **common, **mine}
        if "generator" in takes:
            run.setdefault("generator", torch.Generator().manual_seed(seed + number))
        if strange := [name for name in run if name not in takes]:
            raise CalibrationError(f"{type(pipe).__name__} takes no {strange[0]!r}; it takes {', '.join(takes)}.")
        needed = (p.name for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
        if lacking := [name for name in needed if name not in run]:
            raise CalibrationError(
                f"{type(pipe).__name__} needs {lacking[0]!r}: give calibration=[{{{lacking[0]!r}: ...}}, ...], its "
                "arguments for each run."
            )
        runs.append(run)
    return runs


def model_inputs(models: Sequence[torch.nn.Module], given: Any) -> list[Mapping[str, Any]] | None:
    """Calls of a pipeline's one denoiser, where that is what is given: mappings that hold its sample and its time."""
    if len(models) != 1 or not isinstance(given, Sequence) or isinstance(given, str):
        return None
    calls: list[Any] = list(given)  # pyright: ignore[reportUnknownArgumentType]
    names = parameters_of(models[0])
    known = [name for name in names if name in SAMPLE_NAMES], [name for name in names if name in TIME_NAMES]
    fits = (isinstance(call, Mapping) and all(any(n in call for n in each) for each in known) for call in calls)
    return calls if calls and all(fits) else None


def _listed(given: Prompts, takes_prompts: bool) -> list[dict[str, Any]]:
    def prompts(count: int) -> list[dict[str, Any]]:
        return [{"prompt": DEFAULT[i % len(DEFAULT)]} if takes_prompts else {} for i in range(count)]

    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        count = COUNT if given is None else given
        if takes_prompts and count > len(DEFAULT):
            raise CalibrationError(f"There are {len(DEFAULT)} default prompts, not {count}: give a list of your own.")
        return prompts(max(count, 0))
    if isinstance(given, Tensor):
        return [{**own, "latents": given[i : i + 1]} for i, own in enumerate(prompts(len(given)))]
    if isinstance(given, Path) and given.is_dir():
        images = _images_in(given)
        return [{**own, **image} for own, image in zip(prompts(len(images)), images, strict=True)]
    if isinstance(given, Path):
        lines = [line.strip() for line in read_text(given, CalibrationError).splitlines()]
        if not any(lines):
            raise CalibrationError(f"{given} holds no prompts: write one in each line.")
        return [{"prompt": line} for line in lines if line]
    if isinstance(given, str) and (os.path.exists(given) or given.endswith(".txt")):
        raise CalibrationError(
            f"calibration={given[:200]!r} is text, which is a prompt, and looks like a file: give Path(...) for what "
            "is in it, or a list for a prompt of these words."
        )
    items: Any = [given] if isinstance(given, str) else given  # what a caller gives may be anything
    if not isinstance(items, Sequence) or not all(isinstance(item, (str, Mapping)) for item in items):
        raise CalibrationError(
            f"calibration={str(given)[:50]!r} is neither a number, prompts, the Path of a file with a prompt in each "
            "line or of a folder of images, latents, nor keyword arguments of the pipeline for each run."
        )
    return [{"prompt": item} if isinstance(item, str) else dict(item) for item in items]


def _images_in(folder: Path) -> list[dict[str, Any]]:
    """`image` of each file in the order of names, and `mask_image` where NAME.mask.png lies beside NAME.png."""
    files = {f.stem: f for f in sorted(folder.iterdir()) if f.suffix.lower() in _IMAGES}
    found: list[dict[str, Any]] = []
    for stem, file in files.items():
        if stem.endswith(_MASK) and stem.removesuffix(_MASK) in files:
            continue
        found.append({"image": _opened(file, "RGB")})
        if (mask := files.get(stem + _MASK)) is not None:
            found[-1]["mask_image"] = _opened(mask, "L")
    if not found:
        raise CalibrationError(f"{folder} holds no images ({', '.join(_IMAGES)}).")
    return found


def _opened(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert(mode)
    except (OSError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{file} is no image that can be read: {str(error)[:200].rstrip('.')}.") from error
