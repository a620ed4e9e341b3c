"""The fake-quant backend: it conforms, bit for bit, and its model.py reads well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.border import Border
from tests.backends.conformance import Conformance, compile_for, pytest_generate_tests, quantization_error
from tests.helpers import first
from tests.subjects import Subjects
from tfqc.codegen.target import Target
from tfqc.driver import load
from tfqc.errors import SpecError
from tfqc.runtime import ops
from tfqc.runtime.ops import fake_quantize

__all__ = ["pytest_generate_tests"]


class TestFakeQuantBorder(Border):
    target = "fake-quant"


class TestFakeQuant(Conformance):
    backend = "fake-quant"
    targets = (
        "fake-quant{weights=8 activations=8}", "fake-quant{weights=4 activations=8}",
        "fake-quant{weights=4 activations=4 mode=per-step}", "fake-quant{weights=4 activations=none}",
        "fake-quant{weights=none activations=8 mode=per-token}", "fake-quant{weights=3 activations=8 group=16}",
    )  # fmt: skip

    @pytest.mark.parametrize("name", ["unet2d-scale-shift", "unet-sdxl", "dit-labels", "pixart",
                                      "sd3", "flux"])  # fmt: skip
    def test_every_architecture(self, name: str, compiled: Any, tmp_path: Path) -> None:
        its, program, artifact = compiled(name, "fake-quant{weights=8 activations=8 mode=per-step}")
        loaded = load(artifact.save(tmp_path / "out"))
        for t in ([750.0], [750.0, 0.0], [250.0, 33.0, 0.0]):
            call = its.call(t)
            with torch.no_grad():
                self.check(program(**call), loaded(**call))


def test_more_bits_less_error(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    errors: list[float] = []
    for target in ("fake-quant{weights=none activations=none}", "fake-quant{weights=8 activations=none}",
                   "fake-quant{weights=4 activations=none}", "fake-quant{weights=2 activations=none}"):  # fmt: skip
        program, _ = compile_for(its, target, "fold", tmp_path)
        errors.append(quantization_error(its, program, its.call([750.0, 0.0])))
    assert errors[0] <= 1e-6
    assert errors == sorted(errors) and errors[1] < 0.05 < errors[3]


def test_model_py_can_be_read(subject: Subjects, tmp_path: Path) -> None:
    program, artifact = compile_for(subject("unet2d"), "fake-quant{weights=4 activations=8}", "fold", tmp_path)
    text = artifact.texts["model.py"]
    assert text.startswith('"""UNet2DModel, compiled by tfqc.')
    ours = [line for line in text.splitlines() if line.startswith(("from tfqc", "import tfqc"))]
    assert ours and all(line.startswith("from tfqc.runtime") for line in ours)
    assert "fake_quantize(" in text and "conv2d_rows(" in text and "table_read(self.table__" in text
    assert "    # down_blocks.0.resnets.0.conv1" in text
    assert max(map(len, text.splitlines())) < 400
    compile(text, "model.py", "exec")
    time = set(artifact.tensors["time.safetensors"])
    assert any("time_emb_proj" in n for n in time) and time.isdisjoint(artifact.tensors["weights.safetensors"])
    assert set(artifact.tensors["weights.safetensors"]) | time == set(program.tensors)


def test_the_block_is_read_when_an_unknown_timestep_comes(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    _, artifact = compile_for(its, "fake-quant", "fold", tmp_path / "work")
    out = artifact.save(tmp_path / "out")
    loaded = load(out)
    (out / "time.safetensors").unlink()
    first(loaded(**its.call([750.0, 0.0])))
    with pytest.raises(FileNotFoundError, match=r"time.safetensors"):
        loaded(**its.call([33.0]))


def test_fused_is_the_pair_bit_for_bit() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 10
    for bits in (2, 4, 8):
        scale, zero_point = torch.tensor([0.1, 0.037, 1.7]), torch.tensor([0, 3, 2**bits - 1], dtype=torch.int32)
        for row in (torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 0, 1])):
            codes = ops.quantize(x, scale, zero_point, row, 0, 2**bits - 1)
            want = ops.dequantize(codes, scale, zero_point, row)
            assert torch.equal(fake_quantize(x, scale, zero_point, row, 0, 2**bits - 1), want)
        one = (scale[:1], zero_point[:1])
        want = ops.dequantize(ops.quantize(x, *one, None, 0, 2**bits - 1), *one, None)
        assert torch.equal(fake_quantize(x, *one, None, 0, 2**bits - 1), want)


def test_bad_targets() -> None:
    for text, why in [("fake-quant{weights=1}", "weights=1 is out of range"), ("fake-quant{group=0}", "group=0"),
                      ("fake-quant{wights=4}", "Did you mean 'weights'"),
                      ("fake-quant{mode=dynamic}", "mode")]:  # fmt: skip
        with pytest.raises(SpecError, match=why):
            Target.parse(text)


def test_a_label_that_there_is_not(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d-classes")
    _, artifact = compile_for(its, "fake-quant", "fold", tmp_path / "work")
    model = load(artifact.save(tmp_path / "out"))
    call = its.call([750.0, 750.0])
    with pytest.raises(ValueError, match=r"A whole number among the inputs is beyond what the model knows"):
        model(**{**call, "class_labels": torch.tensor([1, 99])})
    assert repr(artifact).startswith("<artifact for fake-quant: model.py, ")
