"""What a pipeline is run with for calibration: prompts, a file of them, or keyword arguments of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_text

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

Prompts = int | str | Path | Sequence[str] | Sequence[Mapping[str, Any]] | None


def runs_of(pipe: Any, given: Prompts, common: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Keyword arguments of a pipeline for each of its runs; each has a generator of its own.

    Args:
        given: how many of the default prompts, prompts, the Path of a file with a prompt in each line, or keyword
            arguments for each run.
        common: keyword arguments of all runs.

    Raises:
        CalibrationError: there are none, or the pipeline does not take such arguments.
    """
    takes = inspect.signature(pipe.__call__).parameters
    own = [{"prompt": text} if isinstance(text, str) else dict(text) for text in _listed(given, "prompt" in takes)]
    if not own:
        raise CalibrationError("Calibration needs at least one run of the pipeline: there are no prompts.")
    usual = {"output_type": "latent", "return_dict": False}
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


def _listed(given: Prompts, takes_prompts: bool) -> Sequence[str | Mapping[str, Any]]:
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        count = COUNT if given is None else given
        if not takes_prompts:
            return [{} for _ in range(count)]
        if count > len(DEFAULT):
            raise CalibrationError(f"There are {len(DEFAULT)} default prompts, not {count}: give a list of your own.")
        return DEFAULT[: max(count, 0)]
    if isinstance(given, Path):
        return [line.strip() for line in read_text(given, CalibrationError).splitlines() if line.strip()]
    items: Any = [given] if isinstance(given, str) else given  # what a caller gives may be anything
    if not isinstance(items, Sequence) or not all(isinstance(item, (str, Mapping)) for item in items):
        raise CalibrationError(
            f"calibration={str(given)[:50]!r} is neither a number, prompts, the Path of a file with a prompt in each "
            "line, nor keyword arguments of the pipeline for each run."
        )
    return items
