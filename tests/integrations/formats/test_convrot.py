"""int8 ConvRot files: what is written is what an independent reader reads; what is read is what its writer meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from tfqc.errors import ArtifactError, SpecError
from tfqc.integrations.diffusers.layers import replace_layers
from tfqc.integrations.formats.convrot import hadamard, read_convrot, write_convrot

MARK = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}


class Model(nn.Module):
    """Layers that 16 divides, one that it does not, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 6), nn.Linear(16, 32, bias=False)])
        self.odd, self.conv = nn.Linear(6, 6), nn.Conv2d(2, 4, 3)


def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def numpy_rotation(order: int) -> Any:
    """H[r, c] by the base-4 digits of r and c: -1 for each place at which they add up to 3, over sqrt(order)."""
    out = np.ones((order, order))
    for r in range(order):
        for c in range(order):
            a, b = r, c
            for _ in range(round(np.log2(order) / 2)):
                out[r, c] *= -1 if a % 4 + b % 4 == 3 else 1
                a, b = a // 4, b // 4
    return out / np.sqrt(order)


def numpy_reader(path: Path) -> dict[str, Any]:
    """A reader by the description of the format, which shares nothing with ours."""
    stored = load_file(path)
    found = {n: v for n, v in stored.items() if not n.endswith((".comfy_quant", ".weight_scale"))}
    for name in [n for n in stored if n.endswith(".comfy_quant")]:
        layer, mark = name.removesuffix(".comfy_quant"), json.loads(stored[name].tobytes())
        assert mark["format"] == "int8_tensorwise" and stored[f"{layer}.weight"].dtype == np.int8
        assert stored[f"{layer}.weight_scale"].dtype == np.float32
        weight = stored[f"{layer}.weight"].astype(np.float64) * stored[f"{layer}.weight_scale"]
        order = mark["convrot_groupsize"]
        turn = numpy_rotation(order)
        parts = [weight[:, i : i + order] @ turn.T for i in range(0, weight.shape[1], order)]
        found[f"{layer}.weight"] = np.concatenate(parts, axis=1)
    return found


@pytest.mark.parametrize("order", [4, 16, 64])
def test_the_rotation(order: int) -> None:
    """The matrix of the format's description, in its order; symmetric, and its own inverse."""
    made = hadamard(order)
    assert np.allclose(made.numpy(), numpy_rotation(order), atol=1e-12)
    assert torch.equal(made, made.T) and torch.allclose(made @ made, torch.eye(order, dtype=torch.float64))
    for wrong in (0, 2, 8, 100):
        with pytest.raises(SpecError, match=f"group={wrong} is no power of 4"):
            hadamard(wrong)


def test_an_independent_reader_reads_the_weights(tmp_path: Path) -> None:
    its, file = model(), tmp_path / "model.safetensors"
    assert write_convrot(its, file, group=16) == ["blocks.0", "blocks.1"]
    found, own = numpy_reader(file), its.state_dict()
    assert found.keys() == own.keys()
    for name, value in own.items():
        error = np.abs(found[name] - value.numpy()).max() / value.abs().max()
        assert (error < 0.02) if name in ("blocks.0.weight", "blocks.1.weight") else (error == 0)
    scales = load_file(file)["blocks.0.weight_scale"]
    assert scales.shape == (6, 1) and np.abs(load_file(file)["blocks.0.weight"]).max(1).tolist() == [127] * 6
    ours = read_convrot(file)
    assert all(np.allclose(ours[name], value, atol=1e-6) for name, value in found.items())
    model().load_state_dict(ours)
    assert read_convrot(file, torch.bfloat16)["blocks.1.weight"].dtype == torch.bfloat16
    write_convrot(its, tmp_path / "again.safetensors", group=16)
    assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert write_convrot(its, file, group=16, skip=["blocks.0"]) == ["blocks.1"]


def stored(mark: Any, **changed: Any) -> dict[str, Any]:
    """A file as others write it: [4, 32] of codes, under ComfyUI's prefix."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (4, 32), dtype=np.int8)
    tensors = {"a.weight": codes, "a.weight_scale": np.full((4, 1), 0.5, np.float32), "b.bias": np.ones(2, np.float32)}
    if mark is not None:
        tensors["a.comfy_quant"] = np.frombuffer(json.dumps(mark).encode(), np.uint8).copy()
    tensors = {**tensors, **{k.replace("__", "."): v for k, v in changed.items()}}
    return {f"model.diffusion_model.{k}": v for k, v in tensors.items() if v is not None}


def test_files_of_others(tmp_path: Path) -> None:
    """A mark beside the weight or in the metadata; one scale, one for each row; not rotated."""
    file = tmp_path / "f.safetensors"
    save_file(stored(MARK), file)
    first = read_convrot(file)
    assert first.keys() == {"a.weight", "b.bias"}
    assert np.allclose(first["a.weight"], numpy_reader(file)["model.diffusion_model.a.weight"], atol=1e-5)
    central = {"format_version": "1.0", "layers": {"a": MARK}}
    save_file(stored(None), file, metadata={"_quantization_metadata": json.dumps(central)})
    assert torch.equal(read_convrot(file)["a.weight"], first["a.weight"])
    for scale in (np.array(0.5, np.float32), np.full(4, 0.5, np.float32)):
        save_file(stored({**MARK, "per_row": True}, a__weight_scale=scale), file)
        assert torch.equal(read_convrot(file)["a.weight"], first["a.weight"])
    save_file(stored({"format": "int8_tensorwise"}), file)
    assert np.array_equal(read_convrot(file)["a.weight"], stored(None)["model.diffusion_model.a.weight"] * 0.5)


@pytest.mark.parametrize(
    ("mark", "changed", "message"),
    [
        ({"format": "nvfp4"}, {}, "int8_tensorwise is what is read here"),
        ({**MARK, "new": 1}, {}, "says 'new', which tfqc does not know"),
        ({**MARK, "convrot": "yes"}, {}, "convrot='yes': true or false"),
        ({**MARK, "convrot_groupsize": 8}, {}, "in groups of 8: a power of 4 that divides 32"),
        ({**MARK, "convrot_groupsize": 64}, {}, "in groups of 64: a power of 4 that divides 32"),
        (None, {"a__weight_scale": None}, "in int8 and does not say in which format"),
        (None, {}, "a.weight_scale and does not say in which format"),
        (MARK, {"a__weight": None}, "has no a.weight, which it says to be int8"),
        (MARK, {"a__weight_scale": None}, "a.weight has for weight_scale nothing"),
        (MARK, {"a__weight_scale": np.ones((2, 2), np.float32)}, "has scales .2, 2.: one, or one for each of 4"),
        (MARK, {"a__weight_scale": np.full(4, np.nan, np.float32)}, "a scale that is no positive number"),
        (MARK, {"a__weight_scale": np.full((4, 1), 121, np.uint8)}, r"for weight_scale torch.uint8 \[4, 1\]"),
        (MARK, {"a__weight": np.ones((4, 32), np.uint8)}, r"a.weight is torch.uint8 \[4, 32\], and what is marked"),
        (MARK, {"a__weight": np.ones((4, 4, 8), np.int8)}, r"is torch.int8 \[4, 4, 8\], and what is marked"),
        ({**MARK, "orig_shape": [4, 30]}, {}, r"is torch.int8 \[4, 32\], and its mark says \[4, 30\]"),
        (MARK, {"a__comfy_quant": np.frombuffer(b"not json", np.uint8).copy()}, "a.comfy_quant"),
        (MARK, {"a__comfy_quant": np.ones((2, 4), np.uint8)}, r"a.comfy_quant is torch.uint8 \[2, 4\]"),
    ],
)
def test_what_is_not_known_is_refused(mark: Any, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(stored(mark, **changed), tmp_path / "f.safetensors")
    with pytest.raises(ArtifactError, match=message):
        read_convrot(tmp_path / "f.safetensors")


def test_two_things_said_of_one_layer_are_refused(tmp_path: Path) -> None:
    """A format in two places, a name with the prefix and without; the same in two places is taken."""
    file = tmp_path / "f.safetensors"
    for mark in (MARK, {**MARK, "convrot": False}):
        save_file(stored(MARK), file, metadata={"_quantization_metadata": json.dumps({"layers": {"a": mark}})})
        if mark == MARK:
            assert read_convrot(file).keys() == {"a.weight", "b.bias"}
            continue
        with pytest.raises(ArtifactError, match="says of a one format in _quantization_metadata, and another in a"):
            read_convrot(file)
    save_file({**stored(MARK), "b.bias": np.zeros(2, np.float32)}, file)
    with pytest.raises(ArtifactError, match=r"holds both b\.bias and model\.diffusion_model\.b\.bias"):
        read_convrot(file)
    with pytest.raises(SpecError, match=r"dtype=torch\.int8 is none of floating point"):
        read_convrot(file, torch.int8)


def test_weights_without_values_are_read(tmp_path: Path) -> None:
    """However large their groups are said to be."""
    mark = {**MARK, "convrot_groupsize": 4**20}
    save_file(stored(mark, a__weight=np.ones((4, 0), np.int8)), tmp_path / "f.safetensors")
    assert read_convrot(tmp_path / "f.safetensors")["a.weight"].shape == (4, 0)


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    for wrong in (16.0, "16", None, 2, 4**30 * 2):
        with pytest.raises(SpecError, match=f"group={wrong!r} is no power of 4"):
            write_convrot(model(), file, group=wrong)  # pyright: ignore[reportArgumentType]
    for wrong in ("blocks", None, [""]):
        with pytest.raises(SpecError, match="skip="):
            write_convrot(model(), file, group=16, skip=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="A dict is no model"):
        write_convrot({}, file)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="No linear layer of Linear"):
        write_convrot(nn.Linear(16, 16), file, group=16)
    small = model()
    replace_layers(small, lambda name: name == "odd")
    small.odd.take_weight(torch.ones(6, 6))
    with pytest.raises(SpecError, match=r"odd\.weight of Model is torch\.int8: the model is quantized already"):
        write_convrot(small, file, group=16)
    adapted = nn.Sequential(nn.ModuleDict({"base_layer": nn.Linear(16, 16), "lora_A": nn.Linear(16, 16)}))
    with pytest.raises(SpecError, match=r"has an adapter beside 0\.base_layer\.weight: fuse it first"):
        write_convrot(adapted, file, group=16)
    with pytest.raises(SpecError, match="No linear layer of Model has a width that 256 divides: take a smaller"):
        write_convrot(model(), file)
    with pytest.raises(SpecError, match="skip=blcks names no module of Model"):
        write_convrot(model(), file, group=16, skip=["blcks"])
    broken = model()
    broken.blocks[0].weight[0, 0] = torch.nan
    with pytest.raises(SpecError, match=r"The weight of blocks\.0 holds NaN"):
        write_convrot(broken, file, group=16)
    assert not file.exists()
