"""Text encoders and autoencoders, compiled beside the denoiser."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tfqc
from tests.integrations.parts import text_encoder
from tests.integrations.pipelines import pipeline
from tests.integrations.test_quantize import PLAIN, images
from tfqc.codegen.artifact import read_manifest
from tfqc.errors import ArtifactError, CalibrationError, CaptureError, TfqcError
from tfqc.integrations.diffusers.denoiser import TfqcDenoiser
from tfqc.integrations.diffusers.part import TfqcPart
from tfqc.integrations.diffusers.parts import beside, compile_part
from tfqc.integrations.diffusers.place import into
from tfqc.progress import Silent
from tfqc.sampling.recording import Recording


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any], Path]:
    """A pipeline as it was, the same with all parts compiled, keyword arguments of a call, and the artifacts."""
    own, call = pipeline("sd", tmp_path_factory.mktemp("sd"))
    kept = tmp_path_factory.mktemp("kept") / "artifacts"
    made = tfqc.quantize(copy.copy(own), PLAIN, steps=4, calibration=[call], parts="all", directory=kept)
    return own, made, call, kept


def test_a_whole_pipeline_makes_the_same_images(whole: Any) -> None:
    own, made, call, kept = whole
    want = images(own, call)
    assert np.abs(images(made, call) - want).max() < 1e-4
    assert sorted(part.name for part in kept.iterdir()) == ["text_encoder", "unet", "vae.decoder"]
    assert isinstance(made.vae, TfqcPart) and isinstance(made.text_encoder, TfqcPart)
    assert not isinstance(own.vae, TfqcPart) and not any(p.is_meta for p in own.vae.parameters())
    for part in ("vae", "text_encoder"):
        assert getattr(made, part).num_parameters() == getattr(own, part).num_parameters()
        assert getattr(made, part).config.to_dict if part == "text_encoder" else made.vae.config.scaling_factor
    assert "compiled by tfqc: decoder" in repr(made.vae)
    placed = into(kept, copy.copy(own))
    assert np.array_equal(images(placed, call), images(made, call))


def test_a_whole_pipeline_is_saved_and_loaded(whole: Any, tmp_path: Path) -> None:
    own, made, call, _ = whole
    made.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert [index[part] for part in ("vae", "text_encoder")] == [["tfqc", "TfqcPart"]] * 2
    size = (tmp_path / "saved" / "text_encoder" / "model.safetensors").stat().st_size
    assert size < 0.1 * sum(p.numel() * p.itemsize for p in own.text_encoder.parameters())  # norms and biases
    loaded = type(made).from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(images(loaded, call), images(made, call))
    picture = torch.rand(1, 3, 16, 16)
    halves = (loaded.vae, own.vae)  # the encoder, which the pipeline did not call, is what it was
    assert torch.equal(*(vae.encode(picture).latent_dist.mean for vae in halves))


def test_sizes_tiles_slices_and_dtypes_of_an_autoencoder(whole: Any) -> None:
    own, made, *_ = whole
    vaes = [copy.deepcopy(pipe.vae) for pipe in (own, made)]
    latents = torch.randn(2, 4, 12, 24)
    for setting in (None, "enable_slicing", "enable_tiling"):
        for vae in vaes:
            if setting:
                getattr(vae, setting)()
        want, got = (vae.decode(latents).sample for vae in vaes)
        assert got.shape == (2, 3, 24, 48) and (got - want).abs().max() < 1e-5, setting
    moved = vaes[1].to("cpu", torch.bfloat16)
    assert moved.dtype == torch.bfloat16 == next(moved.post_quant_conv.parameters()).dtype
    assert moved.decode(latents.bfloat16()).sample.dtype == torch.bfloat16
    assert made.vae.dtype == torch.float32


@pytest.mark.parametrize(
    "switch",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.unload_lora_weights(),
        lambda pipe: pipe.disable_freeu(),
        lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")),
        lambda pipe: pipe.text_encoder.compile(backend="eager"),
        lambda pipe: pipe.to("cpu", torch.float32),
    ],
)
def test_switches_that_change_no_image(switch: Any, whole: Any) -> None:
    _, made, call, _ = whole
    want = images(made, call)
    pipe = type(made)(**copy.deepcopy(made.components), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    switch(pipe)
    assert np.array_equal(images(pipe, call), want)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.fuse_qkv_projections(vae=False),
        lambda pipe: pipe.vae.fuse_qkv_projections(),
        lambda pipe: pipe.load_textual_inversion({"<x>": torch.zeros(32)}, token="<x>"),
        lambda pipe: pipe.vae.set_attn_processor(None),
        lambda pipe: pipe.unet.load_state_dict({}),
        lambda pipe: pipe.text_encoder.enable_gradient_checkpointing(),
    ],
)
def test_switches_that_are_refused(change: Any, whole: Any) -> None:
    with pytest.raises(TfqcError, match=r"A compiled model cannot do \w+\(\): its layers and weights are fixed"):
        change(whole[1])


def test_where_hooks_and_maps_put_it(whole: Any, tmp_path: Path) -> None:
    """Hooks look for parameters; files of other variants lie beside its own; diffusers asks how large it is."""
    own, made, call, _ = whole
    assert next(made.unet.parameters()).numel() == 1 and not list(made.unet.buffers())
    assert made.unet.get_memory_footprint() > 1e5 < made.vae.get_memory_footprint()
    made = copy.copy(made)
    made.vae = own.vae
    made.save_pretrained(tmp_path / "saved", variant="fp16")
    given = {"variant": "fp16", "device_map": "balanced", "torch_dtype": torch.float32}
    loaded = type(made).from_pretrained(tmp_path / "saved", **given)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(images(loaded, call), images(made, call))
    moved = TfqcDenoiser.from_pretrained(tmp_path / "saved" / "unet", device_map={"": "cpu"}, torch_dtype=torch.float16)
    assert (moved.device, moved.dtype) == (torch.device("cpu"), torch.float16)


def called(*calls: dict[str, Any]) -> list[Recording]:
    return [Recording(list(calls))]


def test_a_text_encoder_in_integers(tmp_path: Path) -> None:
    """As Stable Diffusion calls it to skip its last layers: with all states, and the last norm by itself."""
    torch.manual_seed(0)
    own = text_encoder()
    call = {"input_ids": torch.randint(2, 90, (2, 16)), "attention_mask": None, "output_hidden_states": True}
    artifact = compile_part(own, called(call), tfqc.Target.parse("cpu-int8"), 0, Silent())
    artifact.save(tmp_path / "a")
    assert read_manifest(tmp_path / "a")["target"] == "cpu-int8{activations=per-token}"
    made = TfqcPart(copy.deepcopy(own), {"": tmp_path / "a"})
    call["input_ids"] = torch.randint(2, 90, (1, 9))
    want, got = own(**call), made(**call)
    assert type(got) is type(want) and len(got.hidden_states) == len(want.hidden_states)
    assert (got.last_hidden_state - want.last_hidden_state).abs().mean() < 0.05 * want.last_hidden_state.std()
    state = want.hidden_states[-2]
    assert torch.equal(made.final_layer_norm(state), own.final_layer_norm(state))
    with pytest.raises(ValueError, match="output_hidden_states is False, but the model was captured with True"):
        made(**{**call, "output_hidden_states": False})


def test_what_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = pipeline("dit", tmp_path)
    with pytest.raises(CalibrationError, match=r"parts='vea': DiTPipeline has no 'vea' to .*; it has vae, and 'all'"):
        beside(pipe, "vea")
    with pytest.raises(CaptureError, match="Linear is called without a tensor"):
        compile_part(torch.nn.Linear(1, 1), called({"x": 1}), tfqc.Target.parse(PLAIN), 0, Silent())

    def refused(*_: Any) -> None:
        raise CaptureError("It has a reason.")

    monkeypatch.setattr("tfqc.integrations.diffusers.quantize.compile_part", refused)
    with pytest.raises(CaptureError, match=r"It has a reason\."):
        tfqc.quantize(pipe, PLAIN, steps=2, calibration=[call], parts=["vae"])
    with pytest.warns(UserWarning, match=r"The vae.decoder of this DiTPipeline stays as it is: It has a reason\."):
        tfqc.quantize(pipe, PLAIN, steps=2, calibration=[call], parts="all")
    assert not isinstance(pipe.vae, TfqcPart) and images(pipe, call).shape == (1, 16, 16, 3)


def test_files_of_strangers(whole: Any, tmp_path: Path) -> None:
    whole[1].text_encoder.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())

    def loaded(**facts: Any) -> TfqcPart:
        file.write_text(json.dumps({**config, "quantization_config": {**config["quantization_config"], **facts}}))
        return TfqcPart.from_pretrained(tmp_path)

    with pytest.raises(ArtifactError, match=r"'os\.system' is no class of diffusers or transformers"):
        loaded(model_class="os.system")
    with pytest.raises(ArtifactError, match="Trainer is no model"):
        loaded(model_class="transformers.trainer.Trainer")
    with pytest.raises(ArtifactError, match="is not that of a part which tfqc compiled"):
        loaded(compiled=[1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors lacks .*embedding"):
        loaded(compiled=[])
    assert loaded().dtype == torch.float32
