"""Files from strangers: manifests, headers of tensors, calibration data, schedules."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from tfqc.cli.inspecting import _artifact, _artifact_text
from tfqc.codegen.artifact import MANIFEST, Artifact, check_files, check_output
from tfqc.errors import ArtifactError, CalibrationError
from tfqc.files.storage import read_tensors
from tfqc.runtime.tensors import read_header
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.sampling.scheduler import scheduler_class

_PROGRAM = """tfqc-ir 1
model "chain"
stage captured
symbols B=2
input %x sample ["x"]: Bx2xf32
input %t time ["t"]: Bxi64

func @step(%x: Bx2xf32, %t: Bxi64) {
  %silu: Bx2xf32 = aten.silu.default(%x)
  return %silu
}
"""
_FACTS = {
    "backend": "fake-quant",
    "target": "fake-quant{weights=4}",
    "pipeline": "normalize,discover-tib",
    "model": "chain",
    "inputs": [{"path": ["x"], "role": "sample", "type": "Bx2xf32"}],
    "schedule": {"timesteps": [751.0, 501.5, 1.0], "sampler": {"_class_name": "DDIMScheduler", "_steps": 3}},
    "calibration": {"images": 16, "seed": 0, "guidance": 2.0},
    "report": ["nothing was left in floating point"],
    "versions": {"tfqc": "0.1.0"},
}
_NOTES = "years of work"


@functools.cache
def _files() -> dict[str, bytes]:
    """A whole artifact."""
    weights = {"w": torch.arange(4.0), "codes": torch.ones(2, 2, dtype=torch.int8)}
    return Artifact({"model.py": "x = 1\n", "program.ir": _PROGRAM}, {"weights.safetensors": weights}, _FACTS).files()


def manifest(data: bytes, work: Path) -> None:
    """A manifest is shown or refused, and no file beside it is taken for one that may be removed."""
    directory = work / "artifact"
    if not directory.is_dir():
        directory.mkdir()
        for name, its in _files().items():
            (directory / name).write_bytes(its)
    (directory / "notes.txt").unlink(missing_ok=True)
    (directory / MANIFEST).write_bytes(data)
    try:
        check_files(directory)
        _artifact_text(_artifact(directory))
    finally:
        (directory / "notes.txt").write_text(_NOTES)
        try:
            check_output(directory)
        except ArtifactError:
            pass
        else:
            raise AssertionError("an output with notes.txt would be replaced")


def tensors(data: bytes, work: Path) -> None:
    """Both readers of a file of tensors agree on what it holds."""
    (work / "some.safetensors").write_bytes(data)
    found, _ = read_tensors(work / "some.safetensors", CalibrationError)
    entries = read_header(work / "some.safetensors").entries
    said = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    assert said == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}


def calibration(data: bytes, work: Path) -> None:
    """Data that are taken come back when they are written."""
    (work / "data.safetensors").write_bytes(data)
    its = Calibration.load(work / "data.safetensors")
    its.save(work / "again.safetensors")
    again = Calibration.load(work / "again.safetensors")
    assert (again.batch_size, again.guidance, again.seed) == (its.batch_size, its.guidance, its.seed)
    assert torch.equal(again.latents, its.latents) and again.cond.keys() == its.cond.keys()


def schedule(data: bytes, work: Path) -> None:
    """A schedule that is taken comes back from its text, and its sampler can be made or is refused."""
    its = SamplingSchedule.from_json(data.decode("utf-8", "replace"))
    assert SamplingSchedule.from_json(its.to_json()).timesteps == its.timesteps
    if "_class_name" in its.sampler:
        its.scheduler()


def _schedulers() -> list[bytes]:
    """Schedules of some schedulers; all are imported, as none is while it is watched."""
    for name, cls in inspect.getmembers(diffusers.schedulers, inspect.isclass):
        if name.endswith("Scheduler") and issubclass(cls, SchedulerMixin) and hasattr(cls, "set_timesteps"):
            scheduler_class(name)
    chosen = (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler,
              diffusers.FlowMatchEulerDiscreteScheduler, diffusers.HeunDiscreteScheduler)  # fmt: skip
    return [SamplingSchedule.of(each(), 3).to_json().encode() for each in chosen]


def _calibration() -> list[bytes]:
    tensors = {"latents": torch.ones(2, 3), "cond.a.b": torch.ones(2, 2), "uncond.a.b": torch.zeros(2, 2),
               "shared.ids": torch.arange(3)}  # fmt: skip
    facts = {"guidance": "2.0", "batch_size": "2", "seed": "0"}
    return [safetensors.torch.save(tensors, facts), safetensors.torch.save({"latents": torch.ones(1)}, facts)]


TARGETS = {"manifest": manifest, "tensors": tensors, "calibration": calibration, "schedule": schedule}
SEEDS = {
    "manifest": [_files()[MANIFEST]],
    "tensors": [_files()["weights.safetensors"], *_calibration()],
    "calibration": _calibration(),
    "schedule": [b"[951.0, 501, 1]", *_schedulers()],
}
