"""tfqc.quantize: complete pipelines with a compiled denoiser in the place of their own."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pag.pipeline_pag_sd import StableDiffusionPAGPipeline

import tfqc
from tests.cli.factories import tiny
from tests.integrations.parts import unet
from tests.integrations.pipelines import PIPELINES, pipeline, sd
from tfqc.errors import ArtifactError, CalibrationError, TfqcError
from tfqc.integrations.diffusers.denoiser import TfqcDenoiser
from tfqc.integrations.diffusers.place import into
from tfqc.models.find import denoisers_in

PLAIN = "fake-quant{weights=none activations=none}"
pytestmark = pytest.mark.filterwarnings("ignore:UNetMotionModel. 2 images are computed at once:UserWarning")


def images(pipe: Any, call: dict[str, Any], **more: Any) -> Any:
    """Two images of a prompt where the pipeline makes several, of the same seed each time."""
    takes = inspect.signature(pipe.__call__).parameters
    two = {name: 2 for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in takes and "prompt" in call}
    given = {**call, "num_inference_steps": 4, "output_type": "np", **two}
    made = pipe(**{**given, "generator": torch.Generator().manual_seed(1), **more})
    return np.asarray(made.frames if "frames" in made else made.images)


def denoisers(pipe: Any) -> dict[str, Any]:
    return {name: getattr(pipe, name) for name in denoisers_in(pipe)}


def in_bf16(name: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    pipe, call = pipeline(name, directory)
    floats = {k: v.bfloat16() for k, v in call.items() if isinstance(v, torch.Tensor) and k.endswith("_embeds")}
    return pipe.to(torch.bfloat16), {**call, **floats}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_makes_the_same_images(name: str, tmp_path: Path) -> None:
    """As it is called by its users: two images a prompt, another number of steps, saved and loaded."""
    pipe, call = pipeline(name, tmp_path)
    wanted = {steps: images(pipe, call, num_inference_steps=steps) for steps in (4, 3)}
    own = denoisers(pipe)
    assert tfqc.quantize(pipe, PLAIN, steps=4, calibration=[call]) is pipe
    for part, model in own.items():
        made = getattr(pipe, part)
        assert isinstance(made, TfqcDenoiser) and made.num_parameters() == model.num_parameters()
        assert dict(model.config).items() <= dict(made.config).items() and made.dtype == torch.float32
    for steps, want in wanted.items():
        assert np.abs(images(pipe, call, num_inference_steps=steps) - want).max() < 1e-4
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert [index[part] for part in own] == [["tfqc", "TfqcDenoiser"]] * len(own)
    absent = {part: None for part, found in pipe.components.items() if found is None}
    loaded = type(pipe).from_pretrained(tmp_path / "saved", **absent)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(images(loaded, call), images(pipe, call))


CASES = [
    *((name, PLAIN, "bf16") for name in ("sd", "sdxl", "flux", "svd")),
    *((name, "cpu-int8", dtype) for name in PIPELINES for dtype in ("f32", "bf16")),
]
CASES.remove(("ddpm", "cpu-int8", "bf16"))  # numpy, to which its pipeline turns images, has no bf16
# Of random weights: guidance multiplies the difference of two answers, and DiT's are mostly activations.
FAR = {"animatediff": 0.32, "dit": 0.25}


@pytest.mark.parametrize(("name", "target", "dtype"), CASES)
def test_in_integers_and_in_bf16(name: str, target: str, dtype: str, tmp_path: Path) -> None:
    pipe, call = (in_bf16 if dtype == "bf16" else pipeline)(name, tmp_path)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    want = images(pipe, call)
    tfqc.quantize(pipe, target, steps=4, calibration=[call])
    assert all(model.dtype == kind for model in denoisers(pipe).values())
    got = images(pipe, call)
    assert np.abs(got - want).mean() < FAR.get(name, 0.1) * want.std()
    assert np.array_equal(got, images(pipe, call))
    other = images(pipe, call, num_inference_steps=3)
    assert np.isfinite(other).all() and not np.array_equal(other, got)
    own = denoisers(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    absent = {part: None for part, found in pipe.components.items() if found is None}
    loaded = type(pipe).from_pretrained(tmp_path / "saved", torch_dtype=kind, **absent)
    loaded.set_progress_bar_config(disable=True)
    for part in denoisers(loaded):  # text encoders of transformers keep buffers in f32 where they are loaded
        pipe.register_modules(**{part: getattr(loaded, part)})
    assert all(getattr(pipe, part) is not model for part, model in own.items())
    assert np.array_equal(images(pipe, call), got)


@pytest.mark.parametrize("target", [PLAIN, "cpu-int8"])
def test_embeddings_of_one_row_for_two_images(target: str, tmp_path: Path) -> None:
    """Flux's pipeline does not repeat them: its layers broadcast them."""
    pipe, call = pipeline("flux", tmp_path)
    want = images(pipe, call, num_images_per_prompt=2)
    tfqc.quantize(pipe, target, steps=4, calibration=[call])
    compiled, begun = pipe.transformer.compiled, []
    begin = compiled.begin
    compiled.begin = lambda **request: begun.append(len(request)) or begin(**request)
    got = images(pipe, call, num_images_per_prompt=2)
    assert len(got) == 2 and np.abs(got - want).max() < (1e-4 if target == PLAIN else 0.1)
    assert len(begun) == 1  # the request is one, whatever it was repeated for


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_a_prompt_of_another_length(guidance: float, tmp_path: Path) -> None:
    """Also where all that it was calibrated on have the same: one prompt, and no negative one."""
    pipe, call = pipeline("z_image", tmp_path)
    own = {**call, "guidance_scale": guidance}
    texts = ["a", "a red fox that looks back at us over its shoulder"]
    wanted = [images(pipe, own, prompt=text) for text in texts]
    tfqc.quantize(pipe, PLAIN, steps=4, calibration=[own])
    for text, want in zip(texts, wanted, strict=True):
        assert np.abs(images(pipe, own, prompt=text) - want).max() < 1e-4


def test_each_expert_is_compiled_on_its_own_calls(tmp_path: Path) -> None:
    pipe, call = pipeline("experts", tmp_path)
    early = tfqc.quantize(copy.copy(pipe), PLAIN, steps=4, calibration=[call], directory=tmp_path / "kept")
    schedules = [
        json.loads((tmp_path / "kept" / part / "manifest.json").read_text())["schedule"]["timesteps"]
        for part in denoisers_in(early)
    ]
    assert min(schedules[0]) >= 875 > max(schedules[1]) and len([*schedules[0], *schedules[1]]) == 4
    placed = into(tmp_path / "kept", pipe)
    assert np.array_equal(images(placed, call), images(early, call))


def test_an_expert_that_is_never_called(tmp_path: Path) -> None:
    pipe, call = pipeline("experts", tmp_path)
    pipe.register_to_config(boundary_ratio=0.0)
    with pytest.raises(CalibrationError, match=r"WanPipeline did not call its transformer_2: take"):
        tfqc.quantize(pipe, PLAIN, steps=4, calibration=[call])
    assert not isinstance(pipe.transformer, TfqcDenoiser)


def installed(directory: Path) -> Path:
    """What pip writes beside tfqc when it installs it: what other packages find it by."""
    about = directory / "tfqc-0.dist-info"
    about.mkdir(parents=True)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lines = [
        f"[{group}]\n{name} = {place}" for group, own in project["entry-points"].items() for name, place in own.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tfqc\nVersion: 0\n")
    return directory


@pytest.mark.parametrize(("name", "parts"), [("sd", "all"), ("z_image", "denoiser")])
def test_a_fresh_process_loads_it(name: str, parts: str, tmp_path: Path) -> None:
    """It never says `import tfqc`. Text encoder and autoencoder are compiled, too."""
    pipe, call = pipeline(name, tmp_path)
    tfqc.quantize(pipe, "cpu-int8", steps=4, calibration=[call], parts=parts)
    assert all(model.facts["target"] == "cpu-int8" for model in denoisers(pipe).values())
    want = images(pipe, call)
    pipe.save_pretrained(tmp_path / "saved")
    code = (
        "import sys\n"
        "from diffusers import DiffusionPipeline\n"
        "import numpy, torch\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        f"made = pipe(**{call!r}, num_inference_steps=4, num_images_per_prompt=2, output_type='np',\n"
        "            generator=torch.Generator().manual_seed(1)).images\n"
        "numpy.save(sys.argv[2], made)\n"
    )
    path = os.pathsep.join(map(str, (Path(__file__).parents[2], installed(tmp_path / "site"))))
    given = [sys.executable, "-c", code, tmp_path / "saved", tmp_path / "made.npy"]
    done = subprocess.run(given, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "made.npy"), want)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of Stable Diffusion's kind with a compiled denoiser; tests leave it as it is."""
    pipe, _ = pipeline("sd", tmp_path_factory.mktemp("sd"))
    return tfqc.quantize(pipe, PLAIN, steps=3, calibration=1)


def test_what_pipelines_read_of_a_denoiser(compiled: Any) -> None:
    made = compiled.unet
    assert made.config.in_channels == 4 and made.config["sample_size"] == 8
    assert made.time_embedding.linear_1.in_features == 32  # of a copy without values
    assert next(iter(made.time_embedding.parameters())).is_meta
    assert (made.device, made.to(torch.bfloat16).dtype) == (torch.device("cpu"), torch.bfloat16)
    assert made.to("cpu").float().dtype == torch.float32
    call = {"sample": torch.zeros(2, 4, 8, 8), "timestep": 667, "encoder_hidden_states": torch.zeros(2, 16, 32)}
    output = made(**call)
    assert type(output).__name__ == "UNet2DConditionOutput" and output.sample.shape == (2, 4, 8, 8)
    assert torch.equal(made(**call, return_dict=False)[0], output.sample)
    assert torch.equal(copy.deepcopy(made)(**call).sample, output.sample)
    assert "UNet2DConditionModel, compiled by tfqc for fake-quant" in repr(made)


def test_other_pipelines_take_it(compiled: Any) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**compiled.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16)
    made = pipe("a red fox", image=picture, strength=0.5, num_inference_steps=4, output_type="np").images
    assert made.shape == (1, 16, 16, 3) and np.isfinite(made).all()
    seen: list[int] = []

    def watch(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(int(timestep))
        return values

    pipe("a red fox", image=picture, num_inference_steps=5, strength=0.6, output_type="np", callback_on_step_end=watch)
    assert len(seen) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_freeu(1.0, 1.0, 1.0, 1.0),
        lambda pipe: pipe.unet.fuse_lora(),
        lambda pipe: pipe.unet.set_attn_processor(None),
        lambda pipe: pipe.unet.enable_gradient_checkpointing(),
        lambda pipe: pipe.unet.enable_layerwise_casting(),
    ],
)  # fmt: skip
def test_what_would_change_it_is_refused(change: Any, compiled: Any) -> None:
    with pytest.raises(
        (AttributeError, TfqcError), match=r"A compiled model cannot do \w+\(\): its layers and weights"
    ):
        change(compiled)


def test_a_cache_on_top_is_refused(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(enable_cache=lambda _: None)
    monkeypatch.setitem(vars(compiled.unet), "_skeleton", model)
    with pytest.raises(AttributeError, match=r"cannot do enable_cache\(\).*compile two modules of your own"):
        compiled.unet.enable_cache(None)


def test_what_is_not_taken(compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("run")

    with pytest.raises(TfqcError, match="The unet of this StableDiffusionPipeline is compiled already"):
        tfqc.quantize(compiled)
    with pytest.raises(TfqcError, match="A UNet2DConditionModel is no pipeline of diffusers"):
        tfqc.quantize(unet())
    pipe = sd(tmp_path)
    own = pipe.unet
    monkeypatch.setattr("tfqc.integrations.diffusers.quantize.record_each", never)
    for given, said in (
        ([], "at least one run"),
        (99, "There are 8 default prompts, not 99"),
        (2.5, "neither a number, prompts"),
        ([{"promt": "a"}], "StableDiffusionPipeline takes no 'promt'"),
        (tmp_path / "none.txt", r"none\.txt"),
    ):
        with pytest.raises(CalibrationError, match=said):
            tfqc.quantize(pipe, PLAIN, steps=2, calibration=given)  # pyright: ignore[reportArgumentType]
    assert pipe.unet is own


def test_a_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n\n  two birds  \n")
    pipe = sd(tmp_path)
    tfqc.quantize(pipe, PLAIN, steps=2, calibration=tmp_path / "prompts.txt", directory=tmp_path / "kept")
    (tmp_path / "prompts.txt").unlink()
    assert isinstance(tfqc.load(tmp_path / "kept"), torch.nn.Module)


def test_a_directory_that_was_saved_to_again(tmp_path: Path) -> None:
    """A copy is of the model that was loaded, or it is refused."""
    pipe = tfqc.quantize(sd(tmp_path), PLAIN, steps=2, calibration=1, directory=tmp_path / "out")
    pipe.unet.save_pretrained(tmp_path / "kept")
    (tmp_path / "kept" / "artifact.tfqc").rename(tmp_path / "kept" / "artifact")  # as an earlier tfqc left it
    assert TfqcDenoiser.from_pretrained(tmp_path / "kept").dtype == torch.float32
    tfqc.compile(tiny(), PLAIN, steps=2, calibration=1).save(tmp_path / "out")
    for copied in (lambda: copy.deepcopy(pipe.unet), lambda: pipe.unet.save_pretrained(tmp_path / "again")):
        with pytest.raises(ValueError, match=r"out holds another model than the one that was loaded from it"):
            copied()


def test_an_artifact_of_another_model(tmp_path: Path) -> None:
    pipe, _ = pipeline("sd", tmp_path)
    example = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 5])}
    text = {"encoder_hidden_states": torch.randn(2, 16, 24)}
    for model, more, said in (
        (unet(cross_attention_dim=24), text, "its encoder_hidden_states is Bx16x24, and this one's has 32 channels"),
        (PIPELINES["ddpm"][0](tmp_path).unet, {"sample": torch.randn(2, 3, 8, 8)}, "it is a UNet2DModel"),
    ):
        made = tfqc.compile(model, PLAIN, schedule=[5, 3], example_inputs=example | more)
        where = made.save(tmp_path / type(model).__name__)
        with pytest.raises(TfqcError, match=f"holds another model than this pipeline's UNet2DConditionModel: {said}"):
            into(where, pipe)


def test_a_pipeline_that_changes_attention(tmp_path: Path) -> None:
    """Perturbed attention guidance puts processors of its own into the denoiser, run by run."""
    pipe, call = pipeline("sd", tmp_path)
    pipe = StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False, pag_applied_layers="down")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(CalibrationError, match="changes the attention of its unet while it runs"):
        tfqc.quantize(pipe, PLAIN, steps=2, calibration=[call])
    off = {**call, "pag_scale": 0.0}
    want = images(pipe, off)
    assert np.abs(images(tfqc.quantize(pipe, PLAIN, steps=4, calibration=[off]), off) - want).max() < 1e-4


def test_a_pipeline_of_pipelines(tmp_path: Path) -> None:
    pipe, _ = pipeline("sd", tmp_path)
    pipe.prior_pipe = pipeline("ddpm", tmp_path)[0]
    with pytest.raises(TfqcError, match=r"quantize each of them \(tfqc\.quantize\(pipe\.prior_pipe\)\)"):
        tfqc.quantize(pipe)


@pytest.mark.parametrize("dtype", ["float99", "load", 3, None])
def test_a_dtype_that_is_none(dtype: Any, compiled: Any, tmp_path: Path) -> None:
    compiled.unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["dtype"] = dtype
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"has dtype=.*, which is none"):
        TfqcDenoiser.from_pretrained(tmp_path)


def test_bars_as_the_pipeline_has_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = sd(tmp_path)
    pipe.set_progress_bar_config(disable=False, ncols=100)
    tfqc.quantize(pipe, PLAIN, steps=2, calibration=1)
    told = capfd.readouterr().err
    assert "running the pipeline for calibration: 100%" in told and "capturing UNet2DConditionModel" in told
    assert pipe._progress_bar_config == {"disable": False, "ncols": 100}


def test_files_of_strangers(compiled: Any, tmp_path: Path) -> None:
    compiled.unet.save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    config["quantization_config"]["output_class"] = "os.system"
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    made = TfqcDenoiser.from_pretrained(tmp_path / "unet")
    with pytest.raises(ArtifactError, match=r"'os\.system' is no class of diffusers"):
        made(sample=torch.zeros(1, 4, 8, 8), timestep=1, encoder_hidden_states=torch.zeros(1, 16, 32))
    del config["quantization_config"]
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="is not that of a model which tfqc compiled"):
        TfqcDenoiser.from_pretrained(tmp_path, subfolder="unet")
    weights = tmp_path / "unet" / "artifact.tfqc" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        tfqc.load(tmp_path / "unet" / "artifact.tfqc")
