"""Batches that blocks are trained on: images of all steps, each with its own timestep and request."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from tests.subjects import Subjects, calibration
from tfqc.calibration.batches import SIZE, batches
from tfqc.passing import Context
from tfqc.sampling.schedule import SamplingSchedule


def test_images_of_all_steps(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    schedule = SamplingSchedule.of(DDIMScheduler(), 4)
    ctx = Context(schedule, calibration(its, images=4, batch_size=2), workdir=tmp_path)
    found = batches(its.discovered, ctx, 12)
    steps = torch.cat([batch.steps for batch in found])
    assert steps.bincount().tolist() == [4] * 4  # two of each batch of trajectories
    assert all(len(batch.steps) <= SIZE for batch in found) and len(found[0].steps.unique()) > 1
    for batch in found:
        assert batch.inputs["timestep"].tolist() == [schedule.timesteps[step] for step in batch.steps]
        assert {len(value) for value in batch.inputs.values()} == {len(batch.steps)}
    again = batches(its.discovered, ctx, 12)
    assert all(torch.equal(a.inputs[k], b.inputs[k]) for a, b in zip(found, again, strict=True) for k in a.inputs)
