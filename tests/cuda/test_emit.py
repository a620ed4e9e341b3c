"""Emission: lines and kernels that a reviewer reads on one screen, weights in their order, the same bytes twice.

Goldens lie in `golden/`; `TFQC_UPDATE_GOLDENS=1 python -m pytest tests/cuda/test_emit.py` writes them anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find, first
from tests.lowered import PER_TOKEN, before, example
from tests.subjects import Subject, of_example
from tfqc.backends.cuda_int4.runtime import pack
from tfqc.backends.cuda_int4.runtime.build import MissingCompilerError, compile
from tfqc.backends.cuda_int4.runtime.engine import Engine
from tfqc.backends.cuda_int4.runtime.specialise import ARCHS, Gemm, Kernel, source
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.target import Target
from tfqc.driver import load
from tfqc.frontend import capture
from tfqc.ir.program import Program
from tfqc.passing.pipeline import Pipeline

GOLDEN = Path(__file__).with_name("golden")
W4 = "calibrate-weights{bits=4 method=min-max}"
A4 = "calibrate-activations{bits=4 mode=per-step}"
A8 = "calibrate-activations{bits=8 mode=per-step}"


class Small(nn.Module):
    """A 3 x 3 convolution that the time shifts, a norm, GEGLU, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.conv, self.norm = nn.Linear(1, 32), nn.Conv2d(32, 32, 3, padding=1), nn.LayerNorm(32)
        self.wide, self.narrow = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None]
        tokens = h.flatten(2).transpose(1, 2)
        value, gate = self.wide(self.norm(tokens)).chunk(2, dim=-1)
        tokens = tokens + self.narrow(value * F.gelu(gate))
        return tokens.transpose(1, 2).reshape(x.shape)


SMALL = example(Small, 32, 4, 4)


def small() -> Subject:
    return of_example("small-int4", SMALL)


def finished(its: Subject, activations: str = A4) -> Program:
    return Pipeline.parse("half-precision").run(before("half-precision", its, "cuda-int4", W4, activations))


def emitted(target: str = "cuda-int4{arch=sm_86}", program: Program | None = None) -> Artifact:
    """What a target emits for a program, by default the small one."""
    parsed = Target.parse(target)
    artifact = parsed.backend.emit(finished(small()) if program is None else program, parsed.options)
    artifact.facts |= {"backend": parsed.name, "target": str(parsed)}
    return artifact


def kernels_of(artifact: Artifact) -> list[Kernel]:
    """KERNELS of the artifact's `model.py`."""
    values: dict[str, list[Kernel]] = {}
    exec(artifact.texts["model.py"], values)
    return values["KERNELS"]


def loaded(artifact: Artifact, out: Path) -> Engine:
    model = load(artifact.save(out))
    assert isinstance(model, Engine)
    return model


def between(text: str, start: str, end: str) -> str:
    """Whole lines from the one that starts with `start`, up to `end`."""
    return text[text.index(f"\n{start}") + 1 : text.index(end, text.index(f"\n{start}"))] + end


def same(text: str, name: str) -> None:
    """The text is that of a golden file."""
    file = GOLDEN / name
    if os.environ.get("TFQC_UPDATE_GOLDENS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text.splitlines() == file.read_text().splitlines(), "TFQC_UPDATE_GOLDENS=1 writes it anew"


# -- text ---------------------------------------------------------------------------------------------------------


def test_lines_of_a_step() -> None:
    text = emitted().texts["model.py"]
    step, kernels = between(text, "def step", "\n    return plain_value\n"), between(text, "KERNELS = [", "\n]\n")
    same(f"{step}\n\n{kernels}", "model.py.txt")


def test_entries_of_kernels() -> None:
    """Of the convolution and of what quantizes its input; the others are checked beside `specialise`."""
    artifact = emitted()
    text, kernels = artifact.texts["kernels.cu"], kernels_of(artifact)
    assert text == source(kernels)
    first_, second, third = (f"struct {kernel.name}_constants {{" for kernel in kernels[:3])
    assert text.index(first_) < text.index(second) < text.index(third)
    same(text[text.index(first_) : text.index(third)], "kernels.cu.txt")


def test_the_same_bytes_twice() -> None:
    again = Pipeline.parse("half-precision").run(before("half-precision", small(), "cuda-int4", W4, A4))
    assert emitted().files() == emitted(program=again).files()


def test_which_kernel_computes_what() -> None:
    artifact = emitted()
    names = [kernel.name for kernel in kernels_of(artifact)]
    used = artifact.facts["kernels"]
    assert list(dict.fromkeys(used.values())) == names and len(set(names)) == len(names)
    assert set(artifact.texts) == {"model.py", "kernels.cu", "program.ir"}
    assert artifact.texts["kernels.cu"].count('extern "C"') == len(names)


@pytest.mark.parametrize(
    ("target", "bodies"),
    [
        ("cuda-int4", {"auto"}),
        ("cuda-int4{mode=w4a8}", {"nibble"}),
        *((f"cuda-int4{{arch={arch}}}", {"s4"}) for arch in ("sm_80", "sm_86", "sm_89")),
        *((f"cuda-int4{{arch={arch}}}", {"nibble"}) for arch in ("sm_90a", "sm_120a")),
        ("cuda-int4{arch=sm_86 mode=w4a8}", {"nibble"}),
    ],
)
def test_bodies(target: str, bodies: set[str]) -> None:
    mode = "w4a8" if "w4a8" in target else "w4a4"
    artifact = emitted(target, finished(small(), A8 if mode == "w4a8" else A4))
    products = [kernel for kernel in kernels_of(artifact) if isinstance(kernel, Gemm)]
    assert len(products) == 3
    assert {kernel.body for kernel in products} == bodies and {kernel.mode for kernel in products} == {mode}


# -- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activations", "mode"), [(A4, "w4a4"), (A8, "w4a8"), ("", "w4a16")])
def test_weights_unpack_to_the_codes(activations: str, mode: pack.Mode) -> None:
    program = finished(small(), activations)
    artifact = emitted(program=program)
    kernels = {kernel.name: kernel for kernel in kernels_of(artifact)}
    tensors = artifact.tensors["weights.safetensors"]
    products = {str(args_of(n)[4].target).removesuffix(".codes"): kernels[artifact.facts["kernels"][n.name]]  # type: ignore[union-attr]
                for n in find(program, "tfqc.qlinear") + find(program, "tfqc.qconv")}  # fmt: skip
    assert set(products) == {"conv.weight", "wide.weight", "narrow.weight"}
    for name, kernel in products.items():
        assert isinstance(kernel, Gemm) and kernel.mode == mode
        codes = program.tensors[f"{name}.codes"]
        flat = pack.window_codes(codes) if name.startswith("conv") else codes
        assert torch.equal(pack.unpack(tensors[f"{name}.packed"], kernel.n, kernel.k, kernel.mode, kernel.paired), flat)
        sums = pack.columns(flat.sum(1, dtype=torch.int32), kernel.tile.n, kernel.paired)
        assert torch.equal(tensors[f"{name}.sums"], sums)
        assert f"{name}.codes" not in tensors
    assert products["wide.weight"].paired and not products["narrow.weight"].paired  # type: ignore[union-attr]
    assert not any("time.weight" in name for name in tensors) and "time.weight" in artifact.tensors["time.safetensors"]


class Twice(nn.Module):
    """A weight with and without GEGLU; a value as rows and as windows; names of the helpers."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.shared = nn.Linear(1, 32), nn.Linear(32, 64)
        self.one, self.nine = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, k: Tensor, w: Tensor) -> Tensor:
        h = k + self.time(w.float()[:, None] / 1000)[:, :, None, None]
        h = self.one(h) * 0.5 + self.nine(h)
        tokens = h.flatten(2).transpose(1, 2)
        value, gate = self.shared(tokens).chunk(2, dim=-1)
        tokens = value * F.gelu(gate) + torch.tanh(self.shared(tokens))[..., :32]
        return tokens.transpose(1, 2).reshape(k.shape)


def twice() -> Subject:
    model, inputs = example(Twice, 32, 4, 4)()
    inputs = {"k": inputs["x"], "w": inputs["time"]}
    program = capture(model, inputs, roles={"k": "sample", "w": "time"})
    return Subject("twice", model, inputs, Pipeline.parse("normalize,discover-tib").run(program))


@pytest.mark.filterwarnings("ignore:Kernels for CUDA")
def test_what_is_used_in_two_ways(tmp_path: Path) -> None:
    its = twice()
    program = finished(its)
    artifact = emitted(program=program)
    text, tensors = artifact.texts["model.py"], artifact.tensors["weights.safetensors"]
    codes = program.tensors["shared.weight.codes"]
    for name, paired in (("shared.weight", False), ("shared.weight.1", True)):
        assert torch.equal(pack.unpack(tensors[f"{name}.packed"], 64, 32, "w4a4", paired), codes)
    assert "_q_codes[0]" in text and "_q_codes[1]" in text
    assert "def step(k_: Any, w_: Any, /, *, k: Tensor" in text
    model = loaded(artifact, tmp_path / "out")
    for timesteps in ([750.0], [0.0, 500.0]):
        call = its.call(timesteps)
        with torch.no_grad():
            assert torch.equal(first(program(**call)), first(model(**call)))


# -- compilers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_kernels_spill_nothing(arch: str) -> None:
    artifact = emitted(f"cuda-int4{{arch={arch}}}")
    try:
        made = compile(artifact.texts["kernels.cu"], arch)
    except MissingCompilerError as error:
        pytest.skip(str(error))
    resources = made.resources()
    assert list(sorted(resources)) == sorted(kernel.name for kernel in kernels_of(artifact))
    assert {name: (its.spills, its.stack) for name, its in resources.items()} == dict.fromkeys(resources, (0, 0))


def test_tokens() -> None:
    """Codes of tokens come with their scales."""
    text = emitted(program=finished(small(), PER_TOKEN)).texts["model.py"]
    assert 'k.quantize_tokens("tfqc_quantize8_32_tokens", layer_norm)' in text
