"""The cuda-int4 backend keeps what all backends keep; without a device its lines run with torch, on the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.backends.border import Border
from tests.backends.conformance import Conformance, compile_for
from tests.backends.conformance import pytest_generate_tests as pytest_generate_tests
from tests.helpers import first
from tests.lowered import example
from tests.subjects import Subjects, of_example
from tfqc.codegen.support import compromised
from tfqc.codegen.target import Target
from tfqc.driver import load
from tfqc.errors import SpecError
from tfqc.ir.program import Program

pytestmark = pytest.mark.filterwarnings("ignore:Kernels for CUDA")


class TestCudaInt4Border(Border):
    target = "cuda-int4{arch=sm_86}"


class TestCudaInt4(Conformance):
    backend = "cuda-int4"
    targets = ("cuda-int4{arch=sm_86}", "cuda-int4{arch=sm_90a mode=w4a8 activations=per-token}")
    models: ClassVar = ("unet-sd", "unet2d", "unet-sdxl", "dit")

    def want(self, program: Program, call: dict[str, Any]) -> Tensor:
        """A batch of several timesteps as one batch for each: torch rounds f16 differently in batches of other sizes,
        and a code that flips moves these small random networks by far more than rounding."""
        timestep = call["timestep"]
        # What waits for the request alone is computed for all images of a call at once, and f32 products of BLAS may
        # depend on how many there are: a last bit, which codes make more of.
        self.tolerance = 0 if timestep.dim() == 0 or len(timestep.unique()) == 1 else 0.02
        if timestep.dim() == 0:
            return first(program(**call))
        outs: dict[int, Tensor] = {}
        for t in timestep.unique():
            mine = (timestep == t).nonzero().flatten()
            for entry, out in zip(mine.tolist(), first(program(**_entries(call, mine))), strict=True):
                outs[entry] = out
        return torch.stack([outs[entry] for entry in range(len(timestep))])


def _entries(value: Any, which: Tensor) -> Any:
    if isinstance(value, dict):
        return {k: _entries(v, which) for k, v in value.items()}
    return value.index_select(0, which) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    "target",
    [
        "cuda-int4{mode=w4a8 activations=static}",
        "cuda-int4{activations=per-token rank=16}",
        "cuda-int4{mode=w4a16 rank=16}",
        "cuda-int4{mode=w4a8 group=128 rank=16}",
    ],
)
def test_other_targets(target: str, subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    program, artifact = compile_for(its, target, "fold", tmp_path / "work")
    loaded = load(artifact.save(tmp_path / "out"))
    with torch.no_grad():
        for t in ([750.0], [33.0]):
            assert torch.equal(first(program(**its.call(t))), first(loaded(**its.call(t))))


class Wide(nn.Module):
    """Tokens whose width is no whole number of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 160)
        self.first, self.wide, self.narrow, self.last = (
            nn.Linear(*s) for s in ((160, 160), (160, 640), (320, 160), (160, 160))
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x) + self.time(time.float()[:, None] / 1000)[:, None]
        value, gate = self.wide(h).chunk(2, dim=-1)
        return self.last(self.narrow(value * F.gelu(gate)) + h)


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_groups_of_columns(mode: str, tmp_path: Path) -> None:
    its = of_example("wide", example(Wide, 5, 160))
    program, artifact = compile_for(its, f"cuda-int4{{mode={mode} group=128 edges=none}}", "fold", tmp_path / "work")
    assert artifact.texts["model.py"].count("group=128") >= 3
    loaded = load(artifact.save(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(first(program(**its.call([750.0]))), first(loaded(**its.call([750.0]))))


def test_labels_of_a_batch_with_several_timesteps(subject: Subjects, tmp_path: Path) -> None:
    its = subject("dit-labels")
    program, artifact = compile_for(its, "cuda-int4", "fold", tmp_path / "work")
    loaded, call = load(artifact.save(tmp_path / "out")), its.call([750.0, 0.0])
    with torch.no_grad():
        whole = first(loaded(**call))
        for entry in range(2):
            alone = _entries(call, torch.tensor([entry]))
            assert torch.equal(first(program(**alone)), whole[entry : entry + 1])


def test_options_are_checked() -> None:
    for options, said in (("group=64", "groups of 128"), ("rank=24", "multiples of 16"), ("mode=w8a8", "w4a4")):
        with pytest.raises(SpecError, match=said):
            Target.parse(f"cuda-int4{{{options}}}")


def test_pipelines_have_what_the_options_say() -> None:
    target = Target.parse("cuda-int4{mode=w4a8 group=128 rank=32}")
    text = target.backend.pipeline(target.options, "fold")
    assert text.index("split-low-rank{rank=32}") < text.index("reconstruct-weights")
    options = "weights=4 activations=8 mode=per-step method=mse group=128 group-scope=linear edges=8"
    assert f"plan-quantization{{{options}}}" in text  # groups for linears, channels for what is left
    plain = Target.parse("cuda-int4{mode=w4a16}")
    text = plain.backend.pipeline(plain.options, "fold")
    assert not any(word in text for word in ("group", "low-rank", "calibrate-activations"))


def test_what_multiplies_is_said_before_anything_is_compiled() -> None:
    said = {arch: Target.parse(f"cuda-int4{{arch={arch}}}") for arch in ("sm_86", "sm_90a", "fat")}
    found = {arch: list(map(str, target.backend.remarks(target.options))) for arch, target in said.items()}
    assert found["sm_86"] == ["w4a4 on sm_86: m16n8k64 u4 x s4"]
    assert found["sm_90a"] == ["w4a4 on sm_90a: m16n8k32 u8 x s8, both of 16 times the codes"]
    assert len(found["fat"]) == 5 and set(found["sm_86"] + found["sm_90a"]) < set(found["fat"])
    assert "sm_120a  m16n8k32" in said["fat"].backend.notes()


def test_what_torch_runs_says_why(subject: Subjects, tmp_path: Path) -> None:
    target = Target.parse("cuda-int4")
    program, _ = compile_for(subject("unet2d"), "cuda-int4", "fold", tmp_path)
    said = [because for _, because in compromised(target.backend, program, target.options)]
    assert len(said) == 2  # the first and the last layer
    assert set(said) == {
        "runs in torch: its weight has more than 4 bits (planned as int8{per=channel range=mse} for edges=8, kernels "
        "take int4{per=channel}: say edges=none)"
    }
