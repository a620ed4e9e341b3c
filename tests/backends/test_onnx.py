"""The onnx backend: onnxruntime computes what fake-quant computes on the same pipeline."""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import tfqc
from tests.cli.factories import dit, nested, tiny
from tfqc.codegen.artifact import Artifact
from tfqc.errors import ArtifactError, SpecError, TfqcError
from tfqc.files.storage import places_of, save_tensors
from tfqc.models.spec import ModelSpec

REASON = "the extra tfqc[onnx] is not installed"
onnx: Any = pytest.importorskip("onnx", reason=REASON)
onnxruntime: Any = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)
FOUR = (
    "normalize,discover-tib,plan-quantization{weights=4 activations=8},select-maintenance,calibrate-weights,"
    "calibrate-activations,fold-cache{policy=nearest},insert-qdq"
)
CALIBRATED = {"steps": 3, "calibration": 2}


def difference(a: Any, b: Any) -> float:
    """Relative, over all outputs."""
    pairs = list(zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))
    assert type(a) is type(b) and pairs
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


@functools.cache
def made(make: Callable[[], ModelSpec], target: str) -> Artifact:
    """Compiled once; tests leave it as it is."""
    return tfqc.compile(make(), target, **CALIBRATED)


def both(make: Callable[[], ModelSpec], target: str, directory: Path) -> tuple[Artifact, Any, Any]:
    """The artifact, its model, and fake-quant's on the same pipeline."""
    ours = made(make, target)
    theirs = tfqc.compile(make(), "fake-quant", pipeline=ours.facts["pipeline"], **CALIBRATED)
    return ours, tfqc.load(ours.save(directory / "ours")), tfqc.load(theirs.save(directory / "theirs"))


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (tiny, "onnx"),
        (tiny, "onnx{weights=none activations=none}"),
        (tiny, "onnx{group=6 reconstruct=true}"),
        (nested, "onnx{mode=static}"),
        (dit, "onnx{weights=4}"),
    ],
)
def test_it_computes_what_fake_quant_computes(make: Callable[[], ModelSpec], target: str, tmp_path: Path) -> None:
    """Nested inputs and labels, groups, times of their own for each image, other numbers of images.

    x / s and x * (1 / s) differ in the last bit, so a value between two codes may get the other.
    """
    ours, model, oracle = both(make, target, tmp_path)
    onnx.checker.check_model(str(tmp_path / "ours" / "model.onnx"))
    times, example = ours.facts["schedule"]["timesteps"], make().example_inputs
    assert isinstance(example, dict)
    for now in ([times[1], times[1]], [times[2], times[0]]):
        call = {**example, "timestep": torch.tensor(now).to(example["timestep"].dtype)}
        assert difference(model(**call), oracle(**call)) < 1e-2
    three = pytree.tree_map(
        lambda t: torch.cat([t, t[:1]]) if len(t) == 2 else t, {**example, "timestep": torch.tensor(times[:2]).long()}
    )
    found, known = model(**three), oracle(**three)
    assert difference(found, known) < 1e-2


def test_only_what_is_planned_is_quantized(tmp_path: Path) -> None:
    """Products whose weights alone are quantized get their inputs as they are."""
    _, model, oracle = both(dit, "onnx{activations=none}", tmp_path)
    call = {**dit().example_inputs, "timestep": torch.tensor([333, 333])}  # pyright: ignore[reportGeneralTypeIssues]
    assert difference(model(**call), oracle(**call)) < 1e-5


def test_the_file(tmp_path: Path) -> None:
    """Opset 21, a pair of Q and DQ for each quantized value, weights in place and once, no paths of this machine."""
    ours, _, _ = both(tiny, "onnx", tmp_path)
    data = ours.binaries["model.onnx"]
    model = onnx.load_from_string(data)
    assert [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")] == [21]
    counted = Counter(node.op_type for node in model.graph.node)
    text = ours.texts["program.ir"].partition("func @time")[0]
    assert counted["QuantizeLinear"] == text.count("tfqc.quantize.") == 2
    assert counted["DequantizeLinear"] == text.count("tfqc.dequantize.") + text.count("tfqc.dequantize_weight.") == 4
    assert [i.name for i in model.graph.input] == ["sample", "timestep"]
    assert str(Path(tfqc.__file__).parents[1]).encode() not in data and b"site-packages" not in data
    assert tfqc.compile(tiny(), "onnx", **CALIBRATED).files() == ours.files()
    assert set(ours.files()) == {"model.onnx", "program.ir", "weights.safetensors", "manifest.json"}


def test_large_tensors_are_read_from_the_safetensors_file(tmp_path: Path) -> None:
    artifact = made(dit, "onnx{weights=4}")
    model = onnx.load_from_string(artifact.binaries["model.onnx"])
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert outside
    places = set(places_of(artifact.tensors["weights.safetensors"]).values())
    for tensor in outside:
        its = {e.key: e.value for e in tensor.external_data}
        assert its["location"] == "weights.safetensors" and (int(its["offset"]), int(its["length"])) in places
    # It needs nothing of tfqc: onnxruntime opens the directory wherever it lies.
    moved = artifact.save(tmp_path / "out").rename(tmp_path / "moved")
    session = onnxruntime.InferenceSession(str(moved / "model.onnx"), providers=["CPUExecutionProvider"])
    call = {**dit().example_inputs, "timestep": torch.tensor([333, 333])}  # pyright: ignore[reportGeneralTypeIssues]
    (found,) = session.run(None, {i.name: call[i.name].numpy() for i in session.get_inputs()})
    assert torch.equal(torch.from_numpy(found), tfqc.load(moved)(**call)[0])


def test_four_bits_are_four_bits(tmp_path: Path) -> None:
    """INT4 tensors, read from where they are packed for tfqc."""
    artifact = tfqc.compile(tiny(), "onnx", pipeline=FOUR, **CALIBRATED)
    model = onnx.load_from_string(artifact.binaries["model.onnx"])
    four = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert sorted(list(t.dims) for t in four) == [[2, 4, 3, 3], [4, 2, 3, 3]]
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in four)
    oracle = tfqc.compile(tiny(), "fake-quant", pipeline=FOUR, **CALIBRATED)
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([333, 333])
    models = [tfqc.load(a.save(tmp_path / n)) for n, a in (("ours", artifact), ("theirs", oracle))]
    assert difference(*(model(x, t) for model in models)) < 1e-2


def test_places_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(5, dtype=torch.int8),
        "b": torch.randn(3, 2),
        "c": torch.empty(0),
        "d": torch.tensor(7),
    }
    save_tensors(tmp_path / "t.safetensors", tensors)
    data = (tmp_path / "t.safetensors").read_bytes()
    for name, (start, length) in places_of(tensors).items():
        assert data[start : start + length] == tensors[name].numpy().tobytes()


def test_a_time_of_no_row_is_computed_as_the_nearest(tmp_path: Path) -> None:
    model = tfqc.load(made(tiny, "onnx").save(tmp_path / "out"))
    x = torch.randn(2, 2, 4, 4)
    near, row, other = (model(x, torch.tensor([t, t])) for t in (350, 333, 0))
    assert torch.equal(near, row) and not torch.equal(near, other)
    assert torch.equal(model(x, torch.tensor([332.6, 333.4])), row)
    assert torch.equal(model(x.clone().requires_grad_(), torch.tensor([333, 333])), row)


def test_what_onnx_does_not_have_is_refused() -> None:
    with pytest.raises(SpecError, match="'4' is not"):
        tfqc.compile(tiny(), "onnx{activations=4}", **CALIBRATED)
    with pytest.raises(TfqcError, match="onnx does not run") as error:
        tfqc.compile(tiny(), "onnx{group=5}", **CALIBRATED)
    assert "blocks of DequantizeLinear divide a row of 18, and groups of 5 do not" in error.value.notes[0]
    with pytest.raises(TfqcError, match="onnx does not run") as error:
        tfqc.compile(tiny(), "onnx", pipeline=FOUR.replace("activations=8", "activations=4"), **CALIBRATED)
    assert "QuantizeLinear rounds to all of 8 bits" in error.value.notes[0]


def test_a_damaged_model(tmp_path: Path) -> None:
    artifact = tfqc.compile(tiny(), "onnx", **CALIBRATED)
    artifact.binaries["model.onnx"] = artifact.binaries["model.onnx"][:100]
    with pytest.raises(ArtifactError, match="onnxruntime does not take"):
        tfqc.load(artifact.save(tmp_path / "out"))


def test_torch_says_nothing_of_other_packages() -> None:
    told = list[logging.LogRecord]()
    handler, logger = logging.Handler(), logging.getLogger("torch.onnx")
    handler.emit = told.append
    level, disabled = logger.level, logger.disabled
    logger.addHandler(handler)
    try:
        tfqc.compile(tiny(), "onnx{weights=none activations=none}", steps=3)
    finally:
        logger.removeHandler(handler)
    assert not told and (logger.level, logger.disabled) == (level, disabled)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TfqcError, match=r"needs onnxscript, which is not there: pip install 'tfqc\[onnx\]'"):
        tfqc.compile(tiny(), "onnx", **CALIBRATED)


def test_a_model_without_a_time(tmp_path: Path) -> None:
    def make() -> ModelSpec:
        torch.manual_seed(0)
        return ModelSpec("one", torch.nn.Conv2d(3, 3, 1), {"input": torch.randn(2, 3, 4, 4)}, roles={"input": "sample"})

    call = {"input": torch.randn(3, 3, 4, 4)}
    ours = tfqc.compile(make(), "onnx{mode=static}", calibration=2)
    theirs = tfqc.compile(make(), "fake-quant", pipeline=ours.facts["pipeline"], calibration=2)
    model, oracle = tfqc.load(ours.save(tmp_path / "ours")), tfqc.load(theirs.save(tmp_path / "theirs"))
    assert difference(model(**call), oracle(**call)) < 1e-2
