"""What every backend must do, whatever it compiles to. A backend's test module subclasses `Conformance`:

    class TestFakeQuant(Conformance):
        backend = "fake-quant"
        targets = ("fake-quant{weights=8 activations=8}", ...)

Its emitted models are compared with the reference interpretation of the very program that was emitted: integers bit
for bit, outputs within `tolerance` (0 = bit for bit).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import first
from tests.subjects import Subject, Subjects, calibration
from tfqc.codegen.artifact import Artifact, check_files
from tfqc.codegen.recipes import STRATEGIES
from tfqc.codegen.support import refusals
from tfqc.codegen.target import Target
from tfqc.driver import load
from tfqc.instruments.numerics import relative_error
from tfqc.ir.program import Program, Stage
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.runtime import VERSION
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule

# Few iterations: these tests ask if a strategy runs, not how well it does.
_QUICK = ("reconstruct-tib", "reconstruct-tib{iterations=5}")


class Conformance:
    """Tests that a backend inherits."""

    backend: ClassVar[str]
    targets: ClassVar[Sequence[str]]
    models: ClassVar[Sequence[str]] = ("unet2d", "unet-sd")
    tolerance: ClassVar[float] = 0.0

    # -- compiling ------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    def compiled(self, subject: Subjects, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
        """(model, target, strategy) -> the subject, its lowered program and its artifact; each once a class."""
        workdir = tmp_path_factory.mktemp("trajectories")

        @functools.cache
        def compile(name: str, target: str, strategy: str = "fold") -> tuple[Subject, Program, Artifact]:
            its = subject(name)
            return its, *compile_for(its, target, strategy, workdir)

        return compile

    def check(self, want: Any, got: Any) -> None:
        """Outputs agree as closely as the backend promises."""
        a, b = first(want), first(got)
        assert a.shape == b.shape and a.dtype == b.dtype
        if self.tolerance == 0:
            assert torch.equal(a, b), f"not bit for bit: {relative_error(a, b):.1e}"
        else:
            assert relative_error(a, b) <= self.tolerance

    def want(self, program: Program, call: dict[str, Any]) -> Any:
        """What a loaded model has to give."""
        return program(**call)

    # -- tests ----------------------------------------------------------------------------------------------------

    def test_equals_the_reference(self, compiled: Any, tmp_path: Path, case: tuple[str, str]) -> None:
        """Batches of 1 to 3, timesteps alike and mixed, known and unknown; nothing of the program is refused."""
        its, program, artifact = compiled(*case)
        assert program.stage is Stage.LOWERED
        target = Target.parse(case[1])
        assert refusals(target.backend, program, target.options) == []
        loaded = load(artifact.save(tmp_path / "out"))
        with torch.no_grad():
            for t in ([750.0], [500.0] * 2, [0.0] * 3, [750.0, 0.0], [0.0, 500.0, 250.0], [33.0], [33.0, 34.5, 750.0]):
                call = its.call(t)
                self.check(self.want(program, call), loaded(**call))
            t = torch.tensor(250)
            call = {**its.call([250.0, 250.0]), "timestep": t}
            self.check(self.want(program, call), loaded(**call))

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_every_strategy(self, strategy: str, compiled: Any, tmp_path: Path) -> None:
        its, program, artifact = compiled("unet2d", self.targets[0], strategy)
        loaded = load(artifact.save(tmp_path / "out"))
        for t in ([750.0, 0.0], [250.0], [123.0]):
            with torch.no_grad():
                call = its.call(t)
                self.check(self.want(program, call), loaded(**call))

    def test_a_changed_prompt(self, compiled: Any, tmp_path: Path) -> None:
        name = next((m for m in self.models if m in ("unet-sd", "unet-sdxl", "pixart")), None)
        if name is None:
            pytest.skip("no model with text")
        its, program, artifact = compiled(name, self.targets[0])
        loaded = load(artifact.save(tmp_path / "out"))
        prompt = its.inputs["encoder_hidden_states"].clone()
        call = its.call([750.0, 750.0], encoder_hidden_states=prompt)
        before = first(loaded(**call)).clone()
        prompt.mul_(-1)
        with torch.no_grad():
            self.check(self.want(program, call), loaded(**call))
        assert not torch.equal(before, first(loaded(**call)))

    def test_same_bytes_twice(self, subject: Subjects, compiled: Any, tmp_path: Path) -> None:
        its, _, artifact = compiled("unet2d", self.targets[0])
        _, again = compile_for(its, self.targets[0], "fold", tmp_path)
        assert artifact.files() == again.files()

    @pytest.mark.parametrize("policy", ["nearest", "error"])
    def test_policies(self, policy: str, subject: Subjects, tmp_path: Path) -> None:
        its = subject("unet2d")
        target = self.targets[0].replace("}", f" policy={policy}}}")
        program, artifact = compile_for(its, target, "fold", tmp_path / "work")
        loaded = load(artifact.save(tmp_path / "out"))
        assert not any(name.startswith("time") for name in artifact.files())
        names = {n for tensors in artifact.tensors.values() for n in tensors}
        assert not any(n.startswith("time_embedding") or "time_emb_proj" in n for n in names)
        self.check(self.want(program, its.call([750.0, 0.0])), loaded(**its.call([750.0, 0.0])))
        if policy == "nearest":
            self.check(self.want(program, its.call([749.0, 3.0])), loaded(**its.call([750.0, 0.0])))
        else:
            with pytest.raises(ValueError, match=r"Timestep 749 is not in the schedule"):
                loaded(**its.call([749.0]))

    def test_runs_without_the_compiler(self, compiled: Any, tmp_path: Path) -> None:
        """By its own code, in a process in which nothing can be imported but torch, safetensors and the run time."""
        its, program, artifact = compiled(self.models[-1], self.targets[0])
        out = artifact.save(tmp_path / "out")
        call = its.call([750.0, 33.0])
        with torch.no_grad():
            want = first(self.want(program, call))
        save_file({**call, "want": want}, tmp_path / "call.safetensors")
        script = tmp_path / "run.py"
        script.write_text(_ALONE.format(backend=self.backend.replace("-", "_"), out=str(out)))
        alone = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # torch imports an installed tfqc otherwise
        done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, timeout=120, env=alone)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) <= self.tolerance
        check_files(out)  # and it left nothing there


def compile_for(its: Subject, target: str, strategy: str, workdir: Path) -> tuple[Program, Artifact]:
    """The lowered program, and what the backend emits for it."""
    parsed = Target.parse(target)
    text = parsed.backend.pipeline(parsed.options, strategy).replace(*_QUICK)
    data: Calibration = calibration(its)
    schedule = SamplingSchedule.of(DDIMScheduler(clip_sample=False), 4)
    ctx = Context(schedule=schedule, calibration=data, workdir=workdir)
    program = its.program
    start = text.removeprefix("normalize,discover-tib,")
    pipeline = Pipeline.parse(start) + Pipeline(parsed.backend.legalize(parsed.options))
    pipeline.run(program, ctx)
    if program.stage < Stage.LOWERED:
        program.stage = Stage.LOWERED
    artifact = parsed.backend.emit(program, parsed.options)
    artifact.facts |= {"backend": parsed.name, "target": str(parsed), "runtime": VERSION}
    return program, artifact


def quantization_error(its: Subject, model: nn.Module | Program, call: dict[str, Any]) -> float:
    """‖model − full precision‖ / ‖full precision‖."""
    want: Tensor = its.reference(call)
    with torch.no_grad():
        return float((first(model(**call)) - want).norm() / want.norm())


_ALONE = """
import importlib.machinery
import sys
ours = ("tfqc", "tfqc.errors", "tfqc.version", "tfqc.backends", "tfqc.backends.{backend}")
trees = ("tfqc.runtime", "tfqc.backends.{backend}.runtime")
blocked = ("diffusers", "networkx", "typer", "transformers", "pydantic", "rich", "yaml", "matplotlib", "tabulate")
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        allowed = name in ours or name in trees or name.startswith(tuple(t + "." for t in trees))
        if top in blocked or (top == "tfqc" and not allowed):
            return importlib.machinery.ModuleSpec(name, self)  # torch asks what there is, and imports none of it
    def create_module(self, spec):
        raise ImportError(spec.name + " is blocked")
sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
import tfqc.runtime
call = load_file({out!r} + "/../call.safetensors")
want = call.pop("want")
got = tfqc.runtime.load({out!r}, trust_code=True)(**call)
got = got if isinstance(got, torch.Tensor) else got[0]
sys.path.insert(0, {out!r})
sys.dont_write_bytecode = True
import model
again = model.load({out!r})(**call)
again = again if isinstance(again, torch.Tensor) else again[0]
assert torch.equal(got, again)
print(float((got - want).abs().max() / want.abs().max()))
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Import this in a backend's test module: `case` becomes each model with the first target, and each target with the
    first model and the last."""
    if "case" in metafunc.fixturenames and metafunc.cls is not None:
        models, targets = metafunc.cls.models, metafunc.cls.targets
        cases = [(m, t) for m in models for t in targets if m in (models[0], models[-1]) or t == targets[0]]
        metafunc.parametrize("case", cases, ids=[f"{m}-{t}" for m, t in cases])
