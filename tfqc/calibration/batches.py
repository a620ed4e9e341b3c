"""Images of the full-precision trajectories at steps drawn from all of them: what blocks are reconstructed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tfqc.calibration.observe import source_of
from tfqc.ir.program import Program
from tfqc.passing.context import Context

SEED, SIZE = 0, 16  # of the draw; images of a batch


@dataclass(frozen=True)
class Batch:
    """A call: inputs of @step by name, and of each image the position of its timestep in the schedule, [B] int64."""

    inputs: Mapping[str, Tensor]
    steps: Tensor


def batches(program: Program, ctx: Context, images: int) -> list[Batch]:
    """At least so many images in all if there are, as many of each step, in calls of `SIZE`; the same ones each time.

    Images of several steps share a call, so that each call has something of all. Where the model's code fixes how many
    images a call has, or calls differ in what is one for all images, calls are as they were recorded.
    """
    source = source_of(program, ctx)
    read = (source.read(number) or source.sample(number) for number in range(len(source)))
    calls = [call for trajectory in read for call in trajectory.calls(program)]
    random = torch.Generator().manual_seed(SEED)
    if isinstance(program.batch, int):
        order = torch.randperm(len(calls), generator=random)[: -(-images // program.batch)].tolist()
        return [Batch(calls[i][1], torch.full((program.batch,), calls[i][0])) for i in order]
    own = {item.name for item in program.inputs if item.type.shape[:1] == (program.batch,)}
    drawn: list[Batch] = []
    for step, inputs in calls:
        there = min(len(inputs[name]) for name in own)
        rows = torch.randperm(there, generator=random)[: -(-images // len(calls))]
        chosen = {name: value[rows] if name in own else value for name, value in inputs.items()}
        drawn.append(Batch(chosen, torch.full((len(rows),), step)))
    if not _can_be_mixed(drawn, own):
        return drawn
    steps = torch.cat([batch.steps for batch in drawn])
    joined = {k: torch.cat([b.inputs[k] for b in drawn]) if k in own else v for k, v in drawn[0].inputs.items()}
    order = torch.randperm(len(steps), generator=random).split(SIZE)
    return [Batch({k: v[rows] if k in own else v for k, v in joined.items()}, steps[rows]) for rows in order]


def _can_be_mixed(drawn: list[Batch], own: set[str]) -> bool:
    """Whether images of all calls have one size, and share what they share."""
    return all(
        batch.inputs[name].shape[1:] == value.shape[1:] if name in own else torch.equal(batch.inputs[name], value)
        for batch in drawn
        for name, value in drawn[0].inputs.items()
    )
