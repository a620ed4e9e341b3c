"""The schedule of a diffusers pipeline: the times that it calls its denoiser with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tfqc.models.spec import ModelSpec
from tfqc.sampling.recording import record
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.sampling.scheduler import steps_of

# Arguments of pipelines that stand for the text, by what their denoisers call it.
_TEXT = {
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "pooled_projections": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "text_embeds": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "encoder_attention_mask": ("prompt_attention_mask", "negative_prompt_attention_mask"),
}


def recorded_schedule(pipeline: Any, spec: ModelSpec, steps: int | None) -> tuple[SamplingSchedule | None, str]:
    """A schedule from a run of a pipeline with default arguments, and why there is none.

    A scheduler that has been set to as many steps stays as it was set.

    Args:
        spec: of its denoiser.
        steps: of the sampler; as the pipeline's scheduler is set if None.
    """
    why, own, time = "", steps_of(pipeline.scheduler), spec.time_name() or ""
    count = steps or own
    for call in _calls(pipeline, spec, count):
        try:
            as_set = count is not None and count == own
            return record(pipeline, spec.model, call, as_set=as_set).schedule(time), ""
        except Exception as error:  # whatever a pipeline refuses, or needs and does not have
            why = why or next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")[:200]
    return None, why


def _calls(pipeline: Any, spec: ModelSpec, steps: int | None) -> Iterator[dict[str, Any]]:
    """What to try: the text as embeddings of the example's shapes, which costs nothing, then an empty prompt."""
    takes = inspect.signature(pipeline.__call__).parameters
    general = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False, "class_labels": [0]}
    call = {name: value for name, value in general.items() if name in takes and value is not None}
    rows = {path.rpartition(".")[2]: row for path, row in spec.request_rows().items()}
    text: dict[str, Tensor] = {}
    for name, row in rows.items():
        text |= {argument: row for argument in _TEXT.get(name, ()) if argument in takes}
    if "prompt_embeds" in text:
        masks = [n for n in ("prompt_attention_mask", "negative_prompt_attention_mask") if n in takes]
        ones = torch.ones(text["prompt_embeds"].shape[:2])
        none = dict.fromkeys([n for n in ("prompt", "negative_prompt") if n in takes])
        yield {**call, **dict.fromkeys(masks, ones), **text, **none}
    yield {**call, **({"prompt": ""} if "prompt" in takes else {})}
