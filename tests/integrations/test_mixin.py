"""TfqcConfig in diffusers: the checks of its own quantizer mixin, which skips itself without an accelerator.

`QuantizationTesterMixin` of tests/models/testing_utils/quantization.py in diffusers, written for the CPU.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tfqc
from tests.integrations.parts import WIDTH, unet, video_transformer
from tests.integrations.pipelines import pipeline
from tfqc.errors import SpecError, TfqcError
from tfqc.integrations.diffusers import TfqcConfig, register
from tfqc.integrations.diffusers.layers import Int8Conv2d, Int8Conv3d, Int8Layer, Int8Linear

register()


def sd3() -> Any:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


MODELS: dict[str, tuple[Any, Callable[[], Any], dict[str, Any]]] = {
    "unet": (UNet2DConditionModel, unet, {
        "sample": (2, 4, 8, 8), "timestep": 5, "encoder_hidden_states": (2, 16, WIDTH),
    }),
    "sd3": (SD3Transformer2DModel, sd3, {
        "hidden_states": (2, 4, 8, 8), "timestep": 5, "encoder_hidden_states": (2, 6, WIDTH),
        "pooled_projections": (2, WIDTH),
    }),
    "wan": (WanTransformer3DModel, video_transformer, {
        "hidden_states": (2, 16, 1, 4, 4), "timestep": 5, "encoder_hidden_states": (2, 6, WIDTH),
    }),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", MODELS)


class Case:
    """A saved model, the same as it was, and a call of it."""

    def __init__(self, name: str, directory: Path) -> None:
        torch.manual_seed(0)
        self.cls, make, self.shapes = MODELS[name]
        self.plain, self.directory = make(), directory
        self.plain.save_pretrained(directory)

    def load(self, **more: Any) -> Any:
        return self.cls.from_pretrained(self.directory, **{"quantization_config": TfqcConfig(), **more})

    def run(self, model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        given = {
            name: torch.randn(shape, generator=generator).to(model.dtype)
            if isinstance(shape, tuple)
            else torch.full((2,), shape)
            for name, shape in self.shapes.items()
        }
        with torch.no_grad():
            return model(**given, return_dict=False)[0]


@pytest.fixture
def case(name: str, tmp_path: Path) -> Case:
    return Case(name, tmp_path / "plain")


def int8_layers(model: nn.Module) -> dict[str, Int8Layer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Layer)}


@ALL
def test_num_parameters(case: Case) -> None:
    assert case.load().num_parameters() == case.plain.num_parameters()


@ALL
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1.5), (torch.bfloat16, 1.2)])
def test_memory_footprint(case: Case, dtype: torch.dtype, least: float) -> None:
    """These models are 32 wide, so their scales weigh as much as an eighth of the weights."""
    plain, made = case.plain.to(dtype).get_memory_footprint(), case.load(torch_dtype=dtype).get_memory_footprint()
    assert plain / made > least


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(case: Case, dtype: torch.dtype) -> None:
    want, got = case.run(case.plain), case.run(case.load(torch_dtype=dtype))
    assert got.dtype == dtype and not torch.isnan(got).any()
    assert (got - want).norm() < 0.05 * want.norm()
    assert not torch.equal(got, want)


@pytest.mark.parametrize("name", ["unet"])
def test_dtype_assignment(case: Case) -> None:
    model = case.load()
    for change in (
        lambda: model.to(torch.float16),
        lambda: model.to(device="cpu", dtype=torch.float16),
        model.float,
        model.half,
    ):
        with pytest.raises(ValueError, match=r"quantized model"):
            change()
    assert model.to("cpu") is model


@ALL
def test_serialization(case: Case, tmp_path: Path) -> None:
    """With no config given, and sharded: the same bits."""
    model = case.load()
    want = case.run(model)
    model.save_pretrained(tmp_path / "whole", safe_serialization=True)
    model.save_pretrained(tmp_path / "parts", max_shard_size=model.get_memory_footprint() // 2)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "parts").glob("*.index.json"))) == 1
    for directory, more in (("whole", {}), ("parts", {}), ("whole", {"device_map": "cpu"})):
        again = case.cls.from_pretrained(tmp_path / directory, **more)
        assert torch.equal(case.run(again), want)


@pytest.mark.parametrize("name", ["unet"])
def test_scales_are_not_rounded_to_the_dtype_of_the_rest(case: Case, tmp_path: Path) -> None:
    model = case.load()
    model.save_pretrained(tmp_path / "saved")
    again = case.cls.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert again.conv_in.bias.dtype == torch.bfloat16 and model.conv_in.weight.dtype == torch.int8
    assert torch.equal(again.conv_in.weight_scale, model.conv_in.weight_scale)


@pytest.mark.parametrize("name", ["unet"])
def test_config_serialization(case: Case, tmp_path: Path) -> None:
    model = case.load(quantization_config=TfqcConfig(modules_to_not_convert=["conv_in"]))
    config = model.config.quantization_config
    assert isinstance(config.to_dict(), dict) and isinstance(config.to_diff_dict(), dict)
    assert json.loads(config.to_json_string())["quant_method"] == "tfqc" and "conv_in" in repr(config)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert TfqcConfig.from_dict(saved["quantization_config"]).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ["unet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_original_dtype(case: Case, dtype: torch.dtype) -> None:
    assert case.load(torch_dtype=dtype).config["_pre_quantization_dtype"] == dtype


@ALL
def test_quantized_layers(case: Case) -> None:
    model = case.load()
    kept = case.plain._keep_in_fp32_modules or []
    linears = [n for n, m in case.plain.named_modules() if isinstance(m, nn.Linear) and not any(k in n for k in kept)]
    made = int8_layers(model)
    assert [n for n, m in made.items() if isinstance(m, nn.Linear)] == linears != []
    assert all(type(m) in (Int8Linear, Int8Conv2d, Int8Conv3d) and m.weight.dtype == torch.int8 for m in made.values())
    for layer in made.values():
        assert layer.weight.shape[:1] == layer.weight_scale.shape and int(layer.weight.abs().max()) >= 127


@pytest.mark.parametrize("name", ["wan"])
def test_keep_modules_in_fp32(case: Case) -> None:
    model = case.load(torch_dtype=torch.bfloat16)
    kept = [m for n, m in model.named_modules() if n.endswith("time_embedder.linear_1")]
    assert kept and all(type(m) is nn.Linear and m.weight.dtype == torch.float32 for m in kept)
    assert case.run(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["unet"])
def test_a_module_that_is_not_there(case: Case) -> None:
    with pytest.raises(SpecError, match=r"names 'conv_inn', which is no module of \w+, nor a part"):
        case.load(quantization_config=TfqcConfig(modules_to_not_convert=["conv_inn"]))


@ALL
def test_modules_to_not_convert(case: Case) -> None:
    whole = case.load()
    left = next(iter(int8_layers(whole)))
    model = case.load(quantization_config=TfqcConfig(modules_to_not_convert=[left]))
    assert int8_layers(whole).keys() - int8_layers(model).keys() == {left}
    assert torch.equal(model.get_submodule(left).weight, case.plain.get_submodule(left).weight)
    assert model.get_memory_footprint() > whole.get_memory_footprint()
    assert torch.isfinite(case.run(model)).all()
    part = left.split(".")[0]
    model = case.load(quantization_config=TfqcConfig(modules_to_not_convert=part))
    assert not any(name.split(".")[0] == part for name in int8_layers(model))


@pytest.mark.parametrize("name", ["unet"])
@pytest.mark.parametrize("where", ["auto", "cpu"])
def test_device_map(where: str, case: Case) -> None:
    model = case.load(device_map=where)
    assert model.device == torch.device("cpu") and not any(p.is_meta for p in model.parameters())
    assert where == "cpu" or set(model.hf_device_map.values()) == {"cpu"}
    assert torch.equal(case.run(model), case.run(case.load()))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model = case.load(torch_dtype=dtype)
    want = case.run(model)
    model.dequantize()
    assert not int8_layers(model) and torch.equal(case.run(model), want)
    model.save_pretrained(tmp_path / "saved")
    again = case.cls.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    assert not int8_layers(again) and torch.equal(case.run(again), want)


@pytest.mark.parametrize("name", ["unet"])
def test_lora_inference(case: Case) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not installed")
    model = case.load()
    want = case.run(model)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert torch.equal(case.run(model), want)  # its second matrix starts as zeros
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    got = case.run(model)
    assert torch.isfinite(got).all() and not torch.equal(got, want)


class Adapter(nn.Module):
    """A low-rank branch beside a layer."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.branch = nn.Sequential(nn.Linear(layer.in_features, rank), nn.Linear(rank, layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.branch(x)


@pytest.mark.parametrize("name", ["unet"])
def test_training(case: Case) -> None:
    model = case.load(torch_dtype=torch.bfloat16).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    added: list[Adapter] = []
    for module in list(model.modules()):
        for part in ("to_q", "to_k", "to_v"):
            if hasattr(module, part):
                added.append(Adapter(getattr(module, part), 4))
                setattr(module, part, added[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 16, WIDTH)).sample
    out.float().norm().backward()
    for adapter in added:
        for parameter in adapter.branch.parameters():
            assert parameter.grad is not None and parameter.grad.norm() > 0


@pytest.mark.parametrize("name", ["unet"])
def test_compile(case: Case) -> None:
    model = case.load()
    want = case.run(model)
    model.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(case.run(model), want, atol=1e-5)
        case.run(model)


@pytest.mark.parametrize("name", ["unet"])
def test_compile_and_group_offload(case: Case) -> None:
    model = case.load()
    want = case.run(model)
    model.enable_group_offload(torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    model.compile(backend="eager")
    assert torch.allclose(case.run(model), want, atol=1e-5)


@pytest.mark.parametrize("name", ["unet"])
def test_files_that_are_not_whole(case: Case, tmp_path: Path) -> None:
    case.load().save_pretrained(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    whole = load_file(file)
    for change, said in (
        ({"conv_in.weight": whole["conv_in.weight"].float()}, r"conv_in\.weight holds torch\.float32, and the model"),
        ({"conv_in.weight_scale": None}, r"The model's files hold no conv_in\.weight_scale"),
        ({"conv_in.weight": whole["conv_in.weight"][:1].clone()}, r"conv_in\.weight is 1x4x3x3 in the model's files"),
        ({"conv_in.weight_scale": whole["conv_in.weight_scale"][:1].clone()}, r"weight_scale is 1 in .* model's 32"),
    ):
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, file)
        with pytest.raises(ValueError, match=said):
            case.cls.from_pretrained(tmp_path / "saved")
    save_file({**whole, "conv_in.weight_scale": whole["conv_in.weight_scale"].half()}, file)
    with pytest.raises(ValueError, match=r"weight_scale holds torch\.bfloat16, and scales are float32"):
        case.cls.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)


def test_what_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="target='cuda-int4' has no weights that diffusers could load: use cpu-int8"):
        TfqcConfig("cuda-int4")
    with pytest.raises(SpecError, match="TfqcConfig takes no 'bits': weights have 8 bits"):
        TfqcConfig(bits=4)
    for names in (3, ["conv_in", 3], {"conv_in": True}):
        with pytest.raises(SpecError, match="is no list of names of modules"):
            TfqcConfig(modules_to_not_convert=names)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TfqcError, match=r"This is a compiled model.*TfqcDenoiser\.from_pretrained"):
        TfqcConfig.from_dict({"quant_method": "tfqc", "model_class": "X"})
    case = Case("unet", tmp_path)
    everything = ["conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"]
    with pytest.raises(TfqcError, match="UNet2DConditionModel has no linear layer or convolution to quantize"):
        case.load(quantization_config=TfqcConfig(modules_to_not_convert=everything))


def test_in_a_pipeline(tmp_path: Path) -> None:
    """Loaded quantized, saved and loaded, then compiled with the codes that it holds."""
    pipe, call = pipeline("sd", tmp_path)
    pipe.save_pretrained(tmp_path / "plain")
    config = PipelineQuantizationConfig(quant_mapping={"unet": TfqcConfig()})
    made = DiffusionPipeline.from_pretrained(tmp_path / "plain", quantization_config=config, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    assert int8_layers(made.unet) and not int8_layers(made.vae)

    def images(pipe: Any) -> Any:
        return pipe(**call, num_inference_steps=3, output_type="np", generator=torch.manual_seed(1)).images

    want = images(made)
    made.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(images(again), want)
    own = again.unet
    before = {name: copy.deepcopy(layer.weight) for name, layer in int8_layers(own).items()}
    tfqc.quantize(again, "fake-quant{weights=none activations=none}", steps=3, calibration=[call])
    assert np.abs(images(again) - want).max() < 1e-4
    assert all(torch.equal(layer.weight, before[name]) for name, layer in int8_layers(own).items())
