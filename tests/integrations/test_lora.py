"""LoRA in pipelines: fused before a model is compiled, beside layers that diffusers loaded quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

import tfqc
from tests.integrations.pipelines import pipeline
from tfqc.integrations.diffusers import TfqcConfig, register

peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not installed")
PLAIN = "fake-quant{weights=none activations=none}"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights, as they are shared."""
    directory = tmp_path_factory.mktemp("lora")
    pipe, _ = pipeline("sd", directory)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"]))
    for name, parameter in pipe.unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(directory / "saved", unet_lora_layers=layers)
    return directory / "saved"


def images(pipe: Any, call: dict[str, Any]) -> Any:
    return pipe(**call, num_inference_steps=3, output_type="np", generator=torch.manual_seed(1)).images


def test_fused_before_it_is_quantized(adapter: Path, tmp_path: Path) -> None:
    """As the README shows; time layers are adapted, too, and folded with it."""
    pipe, call = pipeline("sd", tmp_path)
    without = images(pipe, call)
    pipe.load_lora_weights(adapter)
    want = images(pipe, call)
    assert np.abs(want - without).max() > 0.01
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    tfqc.quantize(pipe, PLAIN, steps=3, calibration=[call])
    assert np.abs(images(pipe, call) - want).max() < 1e-4


def test_loaded_and_not_fused(adapter: Path, tmp_path: Path) -> None:
    """Its branches are layers like any: they are compiled as they are."""
    pipe, call = pipeline("sd", tmp_path)
    pipe.load_lora_weights(adapter)
    want = images(pipe, call)
    tfqc.quantize(pipe, PLAIN, steps=3, calibration=[call])
    assert np.abs(images(pipe, call) - want).max() < 1e-4


def test_beside_layers_that_were_loaded_quantized(adapter: Path, tmp_path: Path) -> None:
    register()
    pipe, call = pipeline("sd", tmp_path)
    pipe.save_pretrained(tmp_path / "plain")
    config = PipelineQuantizationConfig(quant_mapping={"unet": TfqcConfig()})
    made = DiffusionPipeline.from_pretrained(tmp_path / "plain", quantization_config=config, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    made.load_lora_weights(adapter)
    pipe.load_lora_weights(adapter)
    want = images(pipe, call)
    assert np.abs(images(made, call) - want).mean() < 0.1 * want.std()
