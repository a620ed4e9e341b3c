"""Whole compiled models: their lines with the compiler's PTX in the interpreter of PTX, and with torch, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.backends.conformance import compile_for
from tests.backends.test_cuda_int4 import Wide
from tests.helpers import first
from tests.lowered import before, example, parts
from tests.ptx import run
from tests.subjects import of_example
from tfqc.backends.cuda_int4.runtime.build import MissingCompilerError, compile
from tfqc.backends.cuda_int4.runtime.engine import Engine
from tfqc.backends.cuda_int4.runtime.reference import Given
from tfqc.backends.cuda_int4.runtime.specialise import Kernel
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.target import Target
from tfqc.driver import load
from tfqc.frontend import capture
from tfqc.ir.program import Program
from tfqc.models.find import find_model
from tfqc.models.spec import ModelSpec
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.loop import initial_noise
from tfqc.sampling.schedule import SamplingSchedule

pytestmark = pytest.mark.filterwarnings("ignore:Kernels for CUDA")

W4 = "calibrate-weights{bits=4 method=min-max}"


@dataclass
class Interpreter:
    """Launches kernels in the interpreter of PTX; `launched` has their names."""

    ptx: str
    launched: list[str] = field(default_factory=list[str])

    def launch(self, kernel: Kernel, rows: int, given: Given) -> None:
        """As a device would: what is given are pointers to its memory."""
        self.launched.append(kernel.name)
        tensors = [given[name] for name in kernel.arguments[:-1]]
        pointers = [np.uint64(0) if tensor is None else tensor.numpy() for tensor in tensors]
        arguments = [*pointers, np.int32(rows)]
        run(self.ptx, kernel.name, kernel.grid(rows), (kernel.threads, 1, 1), arguments, kernel.shared_bytes)


def interpreter(artifact: Artifact, arch: str) -> Interpreter:
    """Of what the compiler makes of an artifact's kernels."""
    try:
        return Interpreter(compile(artifact.texts["kernels.cu"], arch, "ptx").image.decode())
    except MissingCompilerError as error:
        pytest.skip(str(error))


def emitted(program: Program, target: str, out: Path) -> tuple[Artifact, Engine]:
    """The artifact of a lowered program, and its model."""
    parsed = Target.parse(target)
    artifact = parsed.backend.emit(program, parsed.options)
    artifact.facts |= {"backend": parsed.name, "target": str(parsed)}
    loaded = load(artifact.save(out))
    assert isinstance(loaded, Engine)
    return artifact, loaded


def step(model: Engine, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return first(model(**call))


# -- every body, on a model of parts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "activations"),
    [
        ("cuda-int4{arch=sm_90a mode=w4a4}", "calibrate-activations{bits=4 mode=per-step}"),
        ("cuda-int4{arch=sm_90a mode=w4a8}", "calibrate-activations{bits=8 mode=per-token}"),
    ],
)
def test_parts(target: str, activations: str, tmp_path: Path) -> None:
    """Windows of both strides, every activation, rows of tokens, residual sums; two timesteps in a batch."""
    its = parts()
    program = Pipeline.parse("half-precision").run(before("half-precision", its, target, W4, activations))
    artifact, loaded = emitted(program, target, tmp_path / "out")
    call = its.call([750.0, 0.0])
    want = step(loaded, call)
    device = interpreter(artifact, Target.parse(target).options.arch)
    loaded.runner.launch = device.launch  # type: ignore[method-assign]
    assert torch.equal(step(loaded, call), want)
    assert set(device.launched) == set(artifact.facts["kernels"].values())
    assert len(device.launched) == 2 * len(artifact.facts["kernels"])  # a launch is of one row of the schedule


def distance(want: Tensor, got: Tensor) -> float:
    """‖got − want‖ / ‖want‖"""
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ("arch=sm_90a mode=w4a8 group=128", 0.0),
        ("arch=sm_86 mode=w4a4 rank=16", 1e-3),
        ("arch=sm_86 mode=w4a16 group=128 rank=16", 1e-3),
        ("arch=sm_86 mode=w4a16", 1e-3),
    ],
)
def test_groups_branches_and_values(options: str, most: float, tmp_path: Path) -> None:
    """Sums of codes are exact, of groups too; those of f16 are rounded in another order than torch's."""
    its = of_example("wide-tokens", example(Wide, 5, 160))
    target = f"cuda-int4{{{options} edges=none}}"
    program, artifact = compile_for(its, target, "fold", tmp_path / "work")
    loaded = load(artifact.save(tmp_path / "out"))
    assert isinstance(loaded, Engine)
    call = its.call([750.0])
    want = step(loaded, call)
    assert torch.equal(want, first(program(**call)))
    device = interpreter(artifact, Target.parse(target).options.arch)
    loaded.runner.launch = device.launch  # type: ignore[method-assign]
    assert distance(want, step(loaded, call)) <= most
    assert set(device.launched) == set(artifact.facts["kernels"].values())


# -- the model that ships -----------------------------------------------------------------------------------------


@dataclass
class Fashion:
    """The trained model, quantized to 4 bits for 4 steps: before and after the backend's passes."""

    spec: ModelSpec
    quantized: Program
    artifact: Artifact
    model: Engine

    def call(self, timestep: float) -> dict[str, Tensor]:
        """One noisy image of a class."""
        assert self.spec.conditions is not None
        cond, _ = self.spec.conditions(1, 1)
        noise = initial_noise(1, self.spec.sample_shape(), seed=1)
        return {"sample": noise, "timestep": torch.tensor([int(timestep)]), **cond}


TARGET = "cuda-int4{arch=sm_86 mode=w4a4}"


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Fashion:
    """Compiled once: half a minute."""
    spec, parsed = find_model("fashion-unet"), Target.parse(TARGET)
    context = Context(schedule=SamplingSchedule.of(spec.scheduler, 4), calibration=spec.calibration(2))
    program = capture(spec.model, spec.example_inputs, roles=spec.roles, name=spec.name)
    Pipeline.parse(parsed.backend.pipeline(parsed.options, "fold")).run(program, context, [])
    lowered = Pipeline(parsed.backend.legalize(parsed.options)).run(program.clone(), context, [])
    return Fashion(spec, program, *emitted(lowered, TARGET, tmp_path_factory.mktemp("fashion") / "out"))


def test_a_trained_model_in_ptx(fashion: Fashion, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels of a step that is not the first; what lies between them is torch's in either run."""
    device = interpreter(fashion.artifact, "sm_86")
    call = fashion.call(249.0)
    want = step(fashion.model, call)
    assert not torch.equal(want, step(fashion.model, fashion.call(999.0)))
    monkeypatch.setattr(fashion.model.runner, "launch", device.launch)
    assert torch.equal(step(fashion.model, call), want)
    assert set(device.launched) == set(fashion.artifact.facts["kernels"].values())


@pytest.mark.parametrize("timestep", [999.0, 249.0])
def test_a_trained_model_is_as_near_to_fake_quant_as_rounding_lets_it(fashion: Fashion, timestep: float) -> None:
    """What f16 between kernels costs beside fake-quant, which computes in f32 between the same codes.

    A code that lies on a boundary between two is rounded either way, and one of 4 bits that flips is a fifteenth of its
    range: either model is moved by 0.14 to 0.19 of its output by rounding anything to f16, be it no more than the
    sample. So the bound is what fake-quant itself moves by when its sample is rounded. It runs as the program behind
    insert-qdq, which its emitted model equals bit for bit (tests/backends/test_fake_quant.py).
    """
    fake: Callable[..., Any] = fashion.quantized
    call = fashion.call(timestep)
    with torch.no_grad():
        want = first(fake(**call))
        rounded = first(fake(**{**call, "sample": call["sample"].half().float()}))
    moved = distance(want, rounded)
    assert 0 < moved < 0.25
    assert distance(want, step(fashion.model, call)) <= 1.5 * moved
