"""Models by name: folders as they are downloaded, and what is no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.parts import unet
from tfqc.errors import CaptureError
from tfqc.models.find import find_model


def saved(directory: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = unet()
    model.save_pretrained(directory / "unet", **options)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "300KB"}, {"max_shard_size": "300KB"},
     {"variant": "mine"}],
)  # fmt: skip
def test_folders_of_weights_in_any_variant(options: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path, **options)
    found = find_model(str(tmp_path)).model
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_one_of_several_variants(tmp_path: Path) -> None:
    saved(tmp_path, variant="ema")
    model = saved(tmp_path, variant="fp16")
    (tmp_path / "unet" / "diffusion_pytorch_model.ema.safetensors").write_bytes(b"")  # not read
    assert torch.equal(find_model(str(tmp_path)).model.conv_in.weight, model.conv_in.weight)
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
        tmp_path / "unet" / "diffusion_pytorch_model.mine.safetensors"
    )
    with pytest.raises(CaptureError, match=r"holds weights in several variants \(ema, mine\): keep one"):
        find_model(str(tmp_path))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CaptureError, match=r"unet cannot be loaded: .*no file named diffusion_pytorch_model"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flux1-dev-Q4_0.gguf", r"flux1-dev-Q4_0\.gguf is a GGUF file.*model\.dequantize\(\)"),
        ("models/sd_xl.safetensors", r"a checkpoint in a single file.*from_single_file.*tfqc\.quantize"),
        ("sd.ckpt", r"a checkpoint in a single file"),
        ("stabilityai/sdxl-turbo", r"There is no folder stabilityai/sdxl-turbo; .*`hf download stabilityai/sdxl-turbo"),
    ],
)  # fmt: skip
def test_what_to_do_with_what_others_take(name: str, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        find_model(name)
