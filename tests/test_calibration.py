"""Calibration data and trajectories: T network calls an image batch, on disk, resumed, the same twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from tests.subjects import Subject, Subjects, calibration
from tfqc.calibration import Calibration
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program
from tfqc.passing import Context, Progress
from tfqc.schedule import SamplingSchedule
from tfqc.trajectories import timestep_tensor, trajectories


def context(its: Subject, workdir: Path | None, sampler: Any = DDIMScheduler, **others: Any) -> Context:
    schedule = SamplingSchedule.of(sampler(), 4)
    return Context(schedule=schedule, calibration=calibration(its, **others), workdir=workdir)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the network calls."""
    seen: list[int] = []
    plain = Program.__call__

    def counted(self: Program, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(next(v for v in kwargs.values() if isinstance(v, torch.Tensor))))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Program, "__call__", counted)
    return seen


def test_one_trajectory_for_each_image(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    its = subject("unet-sd")
    ctx = context(its, tmp_path, images=5)
    for _ in range(3):
        batches = list(trajectories(its.program, ctx))
    assert calls == [2] * 8 + [1] * 4
    assert [b.samples.shape[:2] for b in batches] == [(4, 2), (4, 2), (4, 1)]
    assert len(list(tmp_path.iterdir())) == 3
    assert ctx.calibration is not None
    assert torch.equal(batches[2].request["encoder_hidden_states"], ctx.calibration.cond["encoder_hidden_states"][4:])


def test_a_file_at_a_time(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    """Bounded memory: batches are read one after another."""
    its = subject("unet2d")
    batches = trajectories(its.program, context(its, tmp_path, images=6))
    next(batches)
    for path in sorted(tmp_path.iterdir())[1:]:
        path.unlink()
    with pytest.raises(FileNotFoundError):
        next(batches)


def test_interrupted_and_resumed(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    its = subject("unet2d")

    class Interrupted:
        def track(self, items: Any, what: str, total: int | None = None) -> Any:
            for number, item in enumerate(items):
                if number == 7:  # in the second batch
                    raise KeyboardInterrupt
                yield item

        def say(self, text: str) -> None: ...

    ctx = context(its, tmp_path, images=6)
    progress: Progress = Interrupted()
    ctx.progress = progress
    with pytest.raises(KeyboardInterrupt):
        list(trajectories(its.program, ctx))
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    calls.clear()
    resumed = list(trajectories(its.program, context(its, tmp_path, images=6)))
    assert len(calls) == 8 and kept.stat().st_mtime_ns == stamp
    fresh = list(trajectories(its.program, context(its, tmp_path / "fresh", images=6)))
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(resumed, fresh, strict=True))


def test_other_data_other_trajectories(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    its = subject("unet-sd")
    list(trajectories(its.program, context(its, tmp_path)))
    other_weights = its.program
    other_weights.tensors["conv_in.bias"] = other_weights.tensors["conv_in.bias"] + 1
    list(trajectories(other_weights, context(its, tmp_path)))
    assert len(calls) == 2 * 8
    changed = context(its, tmp_path)
    assert changed.calibration is not None
    changed.calibration.cond["encoder_hidden_states"].mul_(2)  # type: ignore[attr-defined]
    list(trajectories(its.program, changed))
    list(trajectories(its.program, context(its, tmp_path, guidance=3.0)))
    assert len(calls) == 4 * 8
    its.program.tensors["unused"] = torch.ones(1)
    added = its.program
    added.tensors["act.x.scale"] = torch.ones(4)  # what a pass stores changes no trajectory
    list(trajectories(added, context(its, tmp_path)))
    assert len(calls) == 4 * 8


def test_the_trajectory_is_the_samplers(subject: Subjects, tmp_path: Path) -> None:
    """Inputs of the network, also for a sampler that visits timesteps twice and scales what the network sees."""
    for sampler in (DDIMScheduler, HeunDiscreteScheduler):
        its = subject("unet2d")
        ctx = context(its, tmp_path, sampler)
        seen: list[torch.Tensor] = []
        assert ctx.calibration is not None and ctx.schedule is not None
        scheduler = ctx.schedule.scheduler()
        x = ctx.calibration.latents[:2] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen.append(scheduler.scale_model_input(x, t))
            x = scheduler.step(its.model(seen[-1], t).sample, t, x).prev_sample
        batch = next(iter(trajectories(its.program, ctx)))
        first_visits = [list(map(float, scheduler.timesteps)).index(t) for t in ctx.schedule.timesteps]
        want = torch.stack([seen[i] for i in first_visits])
        assert torch.allclose(batch.samples, want, rtol=1e-3, atol=1e-4)


def test_guidance_doubles_the_batch(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    its = subject("unet-sd")
    data = calibration(its)
    uncond = {k: torch.zeros_like(v) for k, v in data.cond.items()}
    ctx = context(its, tmp_path)
    ctx.calibration = Calibration(data.latents, data.cond, uncond, batch_size=2)
    batches = list(trajectories(its.program, ctx))
    assert calls == [4] * 4 + [2] * 4
    assert torch.equal(batches[0].request["encoder_hidden_states"][2:], data.cond["encoder_hidden_states"][:2])
    assert not batches[0].request["encoder_hidden_states"][:2].any()


def test_shared_inputs(subject: Subjects, tmp_path: Path) -> None:
    its = subject("flux")
    data = calibration(its)
    assert set(data.shared) == {"img_ids", "txt_ids"}
    batches = list(trajectories(its.program, context(its, tmp_path)))
    assert torch.equal(batches[0].request["img_ids"], data.shared["img_ids"])
    times = [inputs["timestep"] for _, inputs in batches[0].calls(its.program)]
    assert {t.dtype for t in times} == {torch.float32}


def test_timesteps_are_typed_as_captured(subject: Subjects) -> None:
    assert timestep_tensor(subject("unet2d").program, [951.0]).dtype == torch.int64
    assert timestep_tensor(subject("unet2d").program, [951.0, 0.5]).tolist() == [951.0, 0.5]
    assert timestep_tensor(subject("flux").program, [1.0]).dtype == torch.float32


@pytest.mark.parametrize("shared", [{}, {"ids": torch.arange(3)}])
def test_saved_and_loaded(shared: dict[str, torch.Tensor], tmp_path: Path) -> None:
    data = Calibration(torch.randn(2, 3), {"a.b": torch.ones(2)}, {"a.b": torch.zeros(2)}, 1.5, 7, 9, shared)
    data.save(tmp_path / "data.safetensors")
    again = Calibration.load(tmp_path / "data.safetensors")
    assert torch.equal(again.latents, data.latents) and again.uncond is not None
    assert torch.equal(again.cond["a.b"], torch.ones(2)) and torch.equal(again.uncond["a.b"], torch.zeros(2))
    assert (again.guidance, again.batch_size, again.seed) == (1.5, 7, 9)
    assert set(again.shared) == set(shared)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    for name in ("no.safetensors", "absent.safetensors"):
        with pytest.raises(CalibrationError, match=r"holds no calibration data"):
            Calibration.load(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"latents": torch.empty(0, 2), "cond": {}}, "at least one image"),
        ({"latents": torch.ones(2, 2), "cond": {"a": torch.ones(3)}}, "a has 3 rows, latents 2; .*shared="),
        ({"latents": torch.ones(2, 2), "cond": {"a": torch.tensor(1.0)}}, "a has no rows"),
        ({"latents": torch.full((2, 2), torch.nan), "cond": {}}, "latents holds NaN"),
        ({"latents": torch.ones(1, 2), "cond": {"a": torch.tensor([torch.inf])}}, "a holds NaN or infinity"),
        ({"latents": torch.ones(1, 2), "cond": {}, "shared": {"b": torch.tensor([torch.nan])}}, "b holds NaN"),
    ],
)  # fmt: skip
def test_bad_data(data: dict[str, Any], why: str) -> None:
    with pytest.raises(CalibrationError, match=why):
        Calibration(**data)
