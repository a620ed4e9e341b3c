"""Artifacts with adapters: against the model with merged weights, and kernels against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfqc
from tests.adapters.model import (
    LAYERS,
    TEMPORAL,
    TIMES,
    Small,
    adapters,
    compiled,
    dequantized,
    inputs,
    made,
    merged,
)
from tests.helpers import first
from tfqc.adapters import LowRank, adapted, check_adapters
from tfqc.codegen.artifact import read_manifest
from tfqc.codegen.reading import read_program
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.errors import TfqcError
from tfqc.ir.rows import RowSource

EXACT = "cpu-int8{residual=fp32 attention=fp32}"  # what rounds between its kernels as little as torch does
FLOAT = {"weights": None, "activations": None}


def run(directory: Path, time: float = 500.0) -> Tensor:
    return first(tfqc.load(directory)(**inputs(time)))


@pytest.mark.parametrize("strategy", ["fold", "table", "tib"])
def test_of_a_float_model_it_is_the_merged_model(strategy: str, tmp_path: Path) -> None:
    """Every layer, and times that are in the schedule and are not."""
    model = made()
    its = adapters(model, *LAYERS)
    directory = compiled(model, "fake-quant", tmp_path / "base", strategy, **FLOAT)
    adapted(directory, its).save(tmp_path / "made")
    for time in (*TIMES, 321.0):
        want = merged(model, its)(**inputs(time))
        assert (want - model(**inputs(time))).abs().max() > 0.1
        torch.testing.assert_close(run(tmp_path / "made", time), want, rtol=1e-4, atol=1e-5)


def test_quantized_weights_stay_what_they_were(tmp_path: Path) -> None:
    model = made()
    its = adapters(model, *LAYERS)
    directory = compiled(model, "fake-quant", tmp_path / "base", activations=None)
    adapted(directory, its).save(tmp_path / "made")
    want = merged(dequantized(model, directory), its)(**inputs())
    torch.testing.assert_close(run(tmp_path / "made"), want, rtol=1e-4, atol=1e-5)
    before, after = read_program(directory).tensors, read_program(tmp_path / "made").tensors
    assert all(torch.equal(after[name], t) for name, t in before.items() if "table" not in name)
    assert read_manifest(tmp_path / "made")["calibration"] == read_manifest(directory)["calibration"]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (EXACT, {}),
        (EXACT, {"mode": "per-token"}),
        (EXACT, {"mode": "static"}),
        ("cpu-int8{residual=fp32 attention=fp32 weights=4}", {"weights": 4}),
    ],
)
def test_kernels_are_as_torch(target: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Activations, gates and residual sums that kernels had taken in are done on the sum with the branch."""
    model = made()
    its = adapters(model, *LAYERS)
    for name, wanted in (("fake", "fake-quant"), ("real", target)):
        adapted(compiled(model, wanted, tmp_path / f"{name}-base", **options), its).save(tmp_path / name)
    want, got = run(tmp_path / "fake"), run(tmp_path / "real")
    assert (want - run(tmp_path / "fake-base")).abs().max() > 0.1
    assert (got - want).abs().mean() < 2e-3 * want.std()  # codes that lie between two round either way


def test_an_adapter_of_zeros_changes_nothing(tmp_path: Path) -> None:
    model = made()
    nothing = {name: LowRank(its.down, its.up * 0) for name, its in adapters(model, *LAYERS).items()}
    for name, target in (("fake", "fake-quant"), ("real", EXACT)):
        adapted(compiled(model, target, tmp_path / f"{name}-base"), nothing).save(tmp_path / name)
        torch.testing.assert_close(run(tmp_path / name), run(tmp_path / f"{name}-base"), rtol=1e-5, atol=1e-5)


def test_only_tables_that_depend_on_it_are_new(tmp_path: Path) -> None:
    model = made()
    directory = compiled(model, "fake-quant", tmp_path / "base", "cache8")
    adapted(directory, adapters(model, "shift")).save(tmp_path / "made")
    before, after = read_program(directory), read_program(tmp_path / "made")
    tables = [name for name, source in before.table(RowSource).items() if source.kind == "table"]
    changed = [name for name in tables if not torch.equal(before.tensors[name], after.tensors[name])]
    assert len(tables) > len(changed) == 1
    source = after.table(RowSource)[changed[0]]
    assert source.encoding == "int8" and after.tensors[changed[0]].dtype is torch.int8
    rows = {**after.tensors}
    its = merged(model, adapters(model, "shift"))
    time = its.time2(F.silu(its.time1(torch.tensor(TIMES)[:, None] / 1000)))
    want = its.shift(F.silu(time)).flatten()
    scale, zero = rows[source.scale][:, None], rows[source.zero_point][:, None]
    got = ((rows[changed[0]].flatten(1).float() - zero) * scale).flatten()
    assert (got - want).abs().max() <= 0.51 * scale.max()


class Labelled(nn.Module):
    """sample [B, 4, 4, 4], timestep [B], class_labels [B], of which there are five."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.time, self.both = nn.Embedding(5, 8), nn.Linear(1, 8), nn.Linear(8, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        known = self.both(F.silu(self.classes(class_labels) + self.time(timestep.float()[:, None] / 1000)))
        return self.conv(sample) + known[:, :, None, None]


def test_tables_of_class_labels(tmp_path: Path) -> None:
    """They have a row for each label at each step."""
    torch.manual_seed(0)
    model = Labelled().requires_grad_(False)
    given = {
        "sample": inputs()["sample"],
        "timestep": torch.tensor([500.0, 100.0]),
        "class_labels": torch.tensor([3, 1]),
    }
    program = tfqc.capture(model, given, domains={"class_labels": 5})
    pipeline = quantization_pipeline("fold", **FLOAT)
    directory = tfqc.compile(program, "fake-quant", schedule=TIMES, pipeline=pipeline).save(tmp_path / "base")
    assert any(source.label for source in read_program(directory).table(RowSource).values())
    its = {"both": LowRank(torch.randn(2, 8), torch.randn(4, 2))}
    adapted(directory, its).save(tmp_path / "made")
    model.both.weight += its["both"].up @ its["both"].down
    torch.testing.assert_close(first(tfqc.load(tmp_path / "made")(**given)), model(**given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["nearest", "error"])
def test_what_is_not_kept_is_not_computed_anew(policy: str, tmp_path: Path) -> None:
    model = made()
    directory = compiled(model, "fake-quant", tmp_path / "base", policy=policy, **FLOAT)
    with pytest.raises(TfqcError, match=r"folded into tables of the schedule \(time1, time2, shift, \.\.\. 1 more\)"):
        check_adapters(directory, adapters(model, *TEMPORAL))
    others = adapters(model, *(name for name in LAYERS if name not in TEMPORAL))
    adapted(directory, others).save(tmp_path / "made")
    torch.testing.assert_close(run(tmp_path / "made"), merged(model, others)(**inputs()), rtol=1e-4, atol=1e-5)


def test_beside_what_is_left_of_a_weight(tmp_path: Path) -> None:
    """Where a part of it has a branch of its own."""
    model = made()
    its = adapters(model, "q", "out", "wide")
    directory = compiled(model, "fake-quant", tmp_path / "base", rank=16, activations=None)
    assert any(name.startswith("q.weight.rest") for name in read_program(directory).tensors)
    adapted(directory, its).save(tmp_path / "made")
    want, base = merged(model, its)(**inputs()), model(**inputs())
    assert (run(tmp_path / "made") - want).abs().mean() < 2 * (run(directory) - base).abs().mean() < 0.02


def test_layers_that_are_none_any_more(tmp_path: Path) -> None:
    model = made()
    pipeline = quantization_pipeline("fold", weights=8, activations=None, reconstruct=False)
    pipeline = pipeline.replace("discover-tib,", "discover-tib,split-concat,")
    artifact = tfqc.compile(model, schedule=TIMES, pipeline=pipeline, example_inputs=inputs())
    with pytest.raises(TfqcError, match=r"does not have as they were \(last\).*Load the LoRA before tfqc.quantize"):
        adapted(artifact.save(tmp_path / "base"), adapters(model, "q", "last"))


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = made()
    directory = compiled(model, "fake-quant", tmp_path / "base", **FLOAT)
    with pytest.raises(TfqcError, match=r"does not have as they were \(nowhere\)"):
        adapted(directory, {"nowhere": LowRank(torch.ones(2, 16), torch.ones(16, 2))})
    with pytest.raises(TfqcError, match=r"does not fit layers of the compiled model \(q\)"):
        adapted(directory, {"q": LowRank(torch.ones(2, 17), torch.ones(16, 2))})


def test_targets_that_take_none(tmp_path: Path) -> None:
    model: Small = made()
    directory = compiled(model, "onnx", tmp_path / "base")
    with pytest.raises(TfqcError, match="compiled for onnx takes no LoRA afterwards"):
        check_adapters(directory, adapters(model, "q"))
