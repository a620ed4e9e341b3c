"""Calibration data and trajectories: T network calls an image batch, on disk, resumed, the same twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from safetensors.torch import save_file

from tests.subjects import Subject, Subjects, calibration
from tfqc.calibration.trajectories import Trajectories, timestep_tensor
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program
from tfqc.passing import Context
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule


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
        batches = list(Trajectories(its.program, ctx))
    assert calls == [2] * 8 + [1] * 4
    assert [b.samples.shape[:2] for b in batches] == [(4, 2), (4, 2), (4, 1)]
    assert len(list(tmp_path.iterdir())) == 3
    assert ctx.calibration is not None
    assert torch.equal(batches[2].request["encoder_hidden_states"], ctx.calibration.cond["encoder_hidden_states"][4:])


def test_a_file_at_a_time(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    """Bounded memory: batches are read one after another; one that has gone is sampled again."""
    its = subject("unet2d")
    whole = list(Trajectories(its.program, context(its, tmp_path, images=6)))
    batches = iter(Trajectories(its.program, context(its, tmp_path, images=6)))
    next(batches)
    for path in sorted(tmp_path.iterdir())[1:]:
        path.unlink()
    calls.clear()
    again = next(batches)
    assert len(calls) == 4 and torch.equal(again.samples, whole[1].samples)


def test_interrupted_and_resumed(
    subject: Subjects, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    its = subject("unet2d")

    stopped = iter(Trajectories(its.program, context(its, tmp_path, images=6)))
    next(stopped)
    plain, left = Program.__call__, iter(range(3))

    def interrupted(self: Program, *args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:  # in the second batch
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stopped)
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    calls.clear()
    resumed = list(Trajectories(its.program, context(its, tmp_path, images=6)))
    assert len(calls) == 8 and kept.stat().st_mtime_ns == stamp
    fresh = list(Trajectories(its.program, context(its, tmp_path / "fresh", images=6)))
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(resumed, fresh, strict=True))


def test_other_data_other_trajectories(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    its = subject("unet-sd")
    list(Trajectories(its.program, context(its, tmp_path)))
    other_weights = its.program
    other_weights.tensors["conv_in.bias"] = other_weights.tensors["conv_in.bias"] + 1
    list(Trajectories(other_weights, context(its, tmp_path)))
    assert len(calls) == 2 * 8
    changed = context(its, tmp_path)
    assert changed.calibration is not None
    changed.calibration.cond["encoder_hidden_states"].mul_(2)  # type: ignore[attr-defined]
    list(Trajectories(its.program, changed))
    list(Trajectories(its.program, context(its, tmp_path, guidance=3.0)))
    assert len(calls) == 4 * 8
    its.program.tensors["unused"] = torch.ones(1)
    added = its.program
    added.tensors["act.x.scale"] = torch.ones(4)  # what a pass stores changes no trajectory
    list(Trajectories(added, context(its, tmp_path)))
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
        batch = next(iter(Trajectories(its.program, ctx)))
        assert batch.visits == tuple(ctx.schedule.timesteps.index(float(t)) for t in scheduler.timesteps)
        assert torch.allclose(batch.samples, torch.stack(seen), rtol=1e-3, atol=1e-4)


def test_guidance_doubles_the_batch(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    its = subject("unet-sd")
    data = calibration(its)
    uncond = {k: torch.zeros_like(v) for k, v in data.cond.items()}
    ctx = context(its, tmp_path)
    ctx.calibration = Calibration(data.latents, data.cond, uncond, batch_size=2)
    batches = list(Trajectories(its.program, ctx))
    assert calls == [4] * 4 + [2] * 4
    assert torch.equal(batches[0].request["encoder_hidden_states"][2:], data.cond["encoder_hidden_states"][:2])
    assert not batches[0].request["encoder_hidden_states"][:2].any()


def test_shared_inputs(subject: Subjects, tmp_path: Path) -> None:
    its = subject("flux")
    data = calibration(its)
    assert set(data.shared) == {"img_ids", "txt_ids"}
    batches = list(Trajectories(its.program, context(its, tmp_path)))
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


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        *(({"batch_size": bad}, f"batch_size is '{bad}', not a whole number") for bad in (0, -1, "x", 1.5, True)),
        *(({"guidance": bad}, f"guidance is '{bad}', not a finite") for bad in (torch.nan, torch.inf, "x", None)),
        ({"seed": "x"}, "seed is 'x', not a whole number"),
        ({"latents": torch.ones(2, 2, dtype=torch.int64)}, "latents must be noise .* not torch.int64 of rank 2"),
        ({"latents": torch.ones(2, 2, dtype=torch.complex64)}, "latents must be noise"),
        ({"latents": torch.tensor(1.0)}, "latents must be noise .* rank 0"),
        ({"latents": [[1.0]]}, "latents is a list, no tensor"),
        ({"cond": {"a": 1}}, "a is a int, no tensor"),
        ({"cond": {"a..b": torch.ones(2)}}, "'a..b' is no name of an input"),
        ({"cond": {"": torch.ones(2)}}, "'' is no name of an input"),
        ({"cond": {"a": torch.ones(2)}, "uncond": {}}, "a is in one of cond and uncond alone"),
        ({"cond": {}, "uncond": {"a": torch.ones(2)}}, "a is in one of cond and uncond alone"),
        ({"cond": {"a": torch.ones(2, 3)}, "uncond": {"a": torch.ones(2, 4)}}, r"a is .* \[2, 3\] in cond"),
        ({"cond": {"a": torch.ones(2)}, "shared": {"a": torch.ones(2)}}, "a is given for each image and as shared"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled(changed: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=why):
        Calibration(**{"latents": torch.ones(2, 2), "cond": {}, **changed})


FACTS = {"guidance": "1.0", "batch_size": "2", "seed": "0"}


@pytest.mark.parametrize(
    ("tensors", "facts", "why"),
    [
        ({}, FACTS, "there is no latents"),
        *(({}, {k: v for k, v in FACTS.items() if k != name}, f"there is no {name}") for name in FACTS),
        ({"extra": torch.ones(1)}, FACTS, "'extra' is no part of them"),
        ({"extra.a": torch.ones(1)}, FACTS, "'extra' is no part of them"),
        *(({}, FACTS | {"batch_size": bad}, "batch_size|invalid literal") for bad in ("0", "-1", "x", "1.5", "")),
        *(({}, FACTS | {"guidance": bad}, "guidance|could not convert") for bad in ("nan", "inf", "x", "")),
        ({}, FACTS | {"seed": "9" * 5000}, "Exceeds the limit"),
        ({"latents": torch.ones(0, 2)}, FACTS, "at least one image"),
        ({"latents": torch.ones(2, dtype=torch.int8)}, FACTS, "latents must be noise"),
        ({"cond.a": torch.ones(3)}, FACTS, "a has 3 rows"),
        ({"cond.": torch.ones(1)}, FACTS, "'' is no name of an input"),
    ],
)  # fmt: skip
def test_files_that_hold_no_calibration_data(
    tensors: dict[str, torch.Tensor], facts: dict[str, str], why: str, tmp_path: Path
) -> None:
    whole = {} if why == "there is no latents" else {"latents": torch.ones(1, 2)}
    save_file(whole | tensors, tmp_path / "data.safetensors", facts)
    with pytest.raises(CalibrationError, match=why) as caught:
        Calibration.load(tmp_path / "data.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_saving_replaces_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Calibration(torch.ones(1, 2), {})
    data.save(tmp_path / "data.safetensors")

    def full(path: Path, tensors: object, facts: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tfqc.files.storage.save_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device"):
        data.save(tmp_path / "data.safetensors")
    assert torch.equal(Calibration.load(tmp_path / "data.safetensors").latents, data.latents)
    assert [p.name for p in tmp_path.iterdir()] == ["data.safetensors"]


def test_every_byte_of_the_weights_counts(subject: Subjects, tmp_path: Path, calls: list[int]) -> None:
    """Keys of some values each were the same for weights that differed in 99% of theirs."""
    its = subject("unet-sd")
    program = its.program
    large = max(program.tensors, key=lambda name: program.tensors[name].numel())
    for position in (0, 1, program.tensors[large].numel() - 2):
        list(Trajectories(program, context(its, tmp_path)))
        program.tensors[large] = program.tensors[large].clone()
        program.tensors[large].view(-1)[position] += 1
    assert len(calls) == 3 * 8


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_file_is_sampled_anew(subject: Subjects, tmp_path: Path, calls: list[int], damage: str) -> None:
    its = subject("unet2d")
    before = list(Trajectories(its.program, context(its, tmp_path)))
    first, second = sorted(tmp_path.iterdir())
    data = bytearray(first.read_bytes())
    data[-100] ^= 1
    other = {"truncated": data[:-9], "flipped": data, "empty": b"", "other": second.read_bytes()[:-1] + b"x"}
    first.write_bytes(other[damage])
    calls.clear()
    after = list(Trajectories(its.program, context(its, tmp_path)))
    assert len(calls) == 4
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(before, after, strict=True))


def test_without_a_directory_they_lie_in_the_users_cache(
    subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    its = subject("unet2d")
    for _ in range(2):
        list(Trajectories(its.program, context(its, None)))
    assert len(calls) == 8
    directory = tmp_path / "tfqc" / "trajectories"
    assert len(list(directory.iterdir())) == 2
    assert [d.stat().st_mode & 0o777 for d in (directory, directory.parent)] == [0o700, 0o700]
    for file in directory.iterdir():
        os.utime(file, (0, 0))
    monkeypatch.setenv("TFQC_CACHE_DAYS", "1")
    list(Trajectories(its.program, context(its, None, guidance=3.0)))
    assert len(list(directory.iterdir())) == 2  # the first two have gone
