"""LoRA loaded onto pipelines that are compiled already, against the same calls of pipelines that are not."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import tfqc
from tests.integrations.pipelines import pipeline
from tfqc.errors import TfqcError
from tfqc.integrations.diffusers.place import into

peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter b was active")
PLAIN = "fake-quant{weights=none activations=none}"
# Layers of each model: some of the sample, some of the text alone, and some of the time, which are folded into tables,
# or computed once an image.
LAYERS = {
    "sd": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "time_emb_proj", "linear_1"],
    "sd3": ["to_q", "add_k_proj", "to_out.0", "ff.net.0.proj", "linear", "linear_1"],
    "flux": ["to_q", "to_out.0", "proj_mlp", "proj_out", "linear", "linear_1"],
}
SCALED = {"sd": "cross_attention_kwargs", "sd3": "joint_attention_kwargs", "flux": "joint_attention_kwargs"}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, name_of(pipe))


def name_of(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def saved(name: str, directory: Path, seed: int = 0, std: float = 0.12, **config: Any) -> Path:
    """A file of LoRA, as it is shared."""
    directory.mkdir()
    pipe, _ = pipeline(name, directory)
    model = denoiser(pipe)
    model.add_adapter(peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": LAYERS[name], **config}))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora" in key:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
    layers = {f"{name_of(pipe)}_lora_layers": peft.get_peft_model_state_dict(model)}
    metadata = {f"{name_of(pipe)}_lora_adapter_metadata": model.peft_config["default"].to_dict()} if config else {}
    pipe.save_lora_weights(directory / "saved", **layers, **metadata)
    return directory / "saved"


def images(pipe: Any, call: dict[str, Any], **more: Any) -> Any:
    generator = torch.manual_seed(1)
    return pipe(**call, **more, num_inference_steps=3, output_type="np", generator=generator).images


def compiled(name: str, target: str, files: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = pipeline(name, files)
    return tfqc.quantize(pipe, target, steps=3, calibration=[call], **options), call


def apart(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("name", LAYERS)
def test_methods_of_diffusers_do_what_they_do(name: str, tmp_path: Path) -> None:
    """Two adapters loaded, weighed, scaled in a call, switched off and on, deleted and unloaded: each time the images
    are those of the pipeline that is not compiled."""
    first, second = (saved(name, tmp_path / f"lora{seed}", seed) for seed in range(2))
    pipe, call = pipeline(name, tmp_path)
    made, _ = compiled(name, PLAIN, tmp_path)
    base = images(pipe, call)
    seen = [base]

    def alike(**more: Any) -> None:
        want = images(pipe, call, **more)
        assert apart(images(made, call, **more), want) < 1e-4
        assert made.get_list_adapters() == pipe.get_list_adapters()
        assert made.get_active_adapters() == pipe.get_active_adapters()
        seen.append(want)

    def both(method: str, *args: Any, **kwargs: Any) -> None:
        for each in (pipe, made):
            getattr(each, method)(*args, **kwargs)

    both("load_lora_weights", first, adapter_name="a")
    alike()
    alike(**{SCALED[name]: {"scale": 0.5}})
    both("load_lora_weights", second, adapter_name="b")
    both("set_adapters", ["a", "b"], [0.7, -0.4])
    alike()
    both("set_adapters", "b")
    alike()
    assert all(apart(one, other) > 0.01 for i, one in enumerate(seen) for other in seen[:i])  # nothing is in vain
    both("disable_lora")
    alike()
    both("enable_lora")
    alike()
    both("delete_adapters", "b")
    both("set_adapters", "a", 0.3)
    alike()
    both("unload_lora_weights")
    alike(**{SCALED[name]: {"scale": 0.5}})
    assert apart(seen[-1], base) == 0


@pytest.mark.parametrize("target", ["fake-quant", "cpu-int8", "cpu-int8{activations=per-token weights=4}"])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_as_near_as_if_it_were_compiled_with_the_model(name: str, target: str, tmp_path: Path) -> None:
    lora = saved(name, tmp_path / "lora")
    pipe, call = pipeline(name, tmp_path)
    pipe.load_lora_weights(lora)
    want = images(pipe, call)
    tfqc.quantize(pipe, target, steps=3, calibration=[call])
    before = np.abs(images(pipe, call) - want).mean()
    made, _ = compiled(name, target, tmp_path)
    without = images(made, call)
    made.load_lora_weights(lora)
    assert np.abs(images(made, call) - want).mean() < 1.5 * before < np.abs(without - want).mean()
    made.unload_lora_weights()
    assert apart(images(made, call), without) == 0


def test_refold_does_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next call would do; and nothing where nothing has changed."""
    made, call = compiled("sd", PLAIN, tmp_path)
    made.load_lora_weights(saved("sd", tmp_path / "lora"))
    made.unet.refold()

    def never(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("tfqc.integrations.diffusers.lora.adapted", never)
    made.unet.refold()
    pipe, _ = pipeline("sd", tmp_path)
    pipe.load_lora_weights(tmp_path / "lora" / "saved")
    assert apart(images(made, call), images(pipe, call)) < 1e-4


def test_an_adapter_swapped_in_place(tmp_path: Path) -> None:
    first, second = (saved("sd", tmp_path / f"lora{seed}", seed, target_modules=["to_q"]) for seed in range(2))
    pipe, call = pipeline("sd", tmp_path)
    pipe.load_lora_weights(second)
    made, _ = compiled("sd", PLAIN, tmp_path)
    made.load_lora_weights(first, adapter_name="a")
    before = images(made, call)
    made.load_lora_weights(second, adapter_name="a", hotswap=True)
    want = images(pipe, call)
    assert apart(images(made, call), want) < 1e-4 < apart(before, want)


def test_threads_that_scale_it_differently(tmp_path: Path) -> None:
    """Each call computes with its own scale, whatever others make of the adapters meanwhile."""
    made, _ = compiled("sd", PLAIN, tmp_path)
    made.load_lora_weights(saved("sd", tmp_path / "lora", target_modules=["to_q"]))
    model = made.unet
    text = torch.randn(2, 16, model.config.cross_attention_dim, generator=torch.manual_seed(0))
    sample = torch.randn(2, 4, model.config.sample_size, model.config.sample_size, generator=torch.manual_seed(0))

    def called(scale: float) -> torch.Tensor:
        time = torch.tensor(round(500 + 100 * scale))
        return model(sample, time, text, cross_attention_kwargs={"scale": scale}).sample

    scales = [0.0, 0.5, 1.0] * 3
    want = [called(scale) for scale in scales]
    with ThreadPoolExecutor(3) as threads:
        got = list(threads.map(called, scales))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_blocks_have_weights_of_their_own(tmp_path: Path) -> None:
    lora = saved("sd", tmp_path / "lora", target_modules=["to_q", "to_v", "time_emb_proj"])
    pipe, call = pipeline("sd", tmp_path)
    made, _ = compiled("sd", PLAIN, tmp_path)
    for each in (pipe, made):
        each.load_lora_weights(lora, adapter_name="a")
        each.set_adapters("a", {"unet": {"down": 0.2, "up": 0.6}})
    assert apart(images(made, call), images(pipe, call)) < 1e-4


@pytest.mark.parametrize("scaled", [{}, {"cross_attention_kwargs": {"scale": 0.5}}])
def test_beside_one_that_was_compiled_with_the_model(scaled: dict[str, Any], tmp_path: Path) -> None:
    first, second = (saved("sd", tmp_path / f"lora{seed}", seed) for seed in range(2))
    pipe, call = pipeline("sd", tmp_path)
    pipe.load_lora_weights(first, adapter_name="a")
    made, _ = pipeline("sd", tmp_path)
    made.load_lora_weights(first, adapter_name="a")
    call |= scaled
    tfqc.quantize(made, PLAIN, steps=3, calibration=[call])
    made.load_lora_weights(second, adapter_name="b")
    pipe.load_lora_weights(second, adapter_name="b")
    pipe.set_adapters(["a", "b"])
    assert apart(images(made, call), images(pipe, call)) < 1e-4


def test_other_numbers_of_steps(tmp_path: Path) -> None:
    """Times that no table holds are computed with the adapters, too."""
    lora = saved("sd", tmp_path / "lora")
    pipe, call = pipeline("sd", tmp_path)
    made, _ = compiled("sd", PLAIN, tmp_path)
    for each in (pipe, made):
        each.load_lora_weights(lora)
    want, got = (
        each(**call, num_inference_steps=4, output_type="np", generator=torch.manual_seed(1)).images
        for each in (pipe, made)
    )
    assert apart(got, want) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pipelines_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    lora = saved("sd", tmp_path / "lora")
    pipe, call = pipeline("sd", tmp_path)
    pipe.load_lora_weights(lora)
    want = images(pipe, call)
    made, _ = pipeline("sd", tmp_path)
    without = images(made, call)
    tfqc.quantize(made.to(dtype), PLAIN, steps=3, calibration=[call])
    made.load_lora_weights(lora)
    assert made.unet.dtype == dtype
    assert np.abs(images(made, call) - want).mean() < 0.1 * np.abs(without - want).mean()


def test_saved_loaded_and_copied(tmp_path: Path) -> None:
    lora = saved("sd", tmp_path / "lora")
    made, call = compiled("sd", "cpu-int8", tmp_path)
    without = images(made, call)
    made.load_lora_weights(lora)
    want = images(made, call)
    assert apart(want, without) > 0.01
    with pytest.raises(TfqcError, match=r"without its LoRA: unload it .*, save, and load"):
        made.save_pretrained(tmp_path / "pipe")
    copied = copy.deepcopy(made.unet)
    made.unload_lora_weights()
    made.save_pretrained(tmp_path / "pipe")
    for each in (copied, pickle.loads(pickle.dumps(copied))):
        made.unet = each
        assert apart(images(made, call), want) == 0
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    again.load_lora_weights(lora)
    assert apart(images(again, call), want) == 0


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "artifact"
    made, call = compiled("sd", "fake-quant{policy=nearest}", tmp_path, directory=directory)
    without = images(made, call)
    sample = saved("sd", tmp_path / "sample", 1, target_modules=["to_q", "to_k"])
    made.load_lora_weights(sample, adapter_name="a")
    want = images(made, call)
    assert apart(want, without) > 0.001
    with pytest.raises(TfqcError, match=r"folded into tables.*time_emb_proj.*compile it with policy=recompute"):
        made.load_lora_weights(saved("sd", tmp_path / "time"), adapter_name="b")
    assert made.get_list_adapters() == {"unet": ["a"]} and made.get_active_adapters() == ["a"]
    assert apart(images(made, call), want) == 0
    with pytest.raises(TfqcError, match=r"The LoRA of .*to_q \('c'\) holds NaN or infinity: its file is broken"):
        made.load_lora_weights(
            saved("sd", tmp_path / "broken", std=float("nan"), target_modules=["to_q"]), adapter_name="c"
        )
    assert made.get_active_adapters() == ["a"] and apart(images(made, call), want) == 0
    with pytest.raises(AttributeError, match=r"cannot do fuse_lora\(\)"):
        made.fuse_lora(components=["unet"])
    other, _ = pipeline("sd", tmp_path)
    into(directory, other)
    with pytest.raises(TfqcError, match=r"is DoRA or has a bias.*load it before tfqc.quantize"):
        other.load_lora_weights(saved("sd", tmp_path / "dora", target_modules=["to_q"], use_dora=True))
    assert other.get_list_adapters() == {} and apart(images(other, call), without) == 0
