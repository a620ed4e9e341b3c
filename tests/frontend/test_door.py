"""Models and arguments as people have them: wrapped, called by keyword, with inputs named in other ways."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfqc
from tfqc.errors import CalibrationError, CaptureError
from tfqc.frontend import capture
from tfqc.frontend.unwrap import unwrapped
from tfqc.ir.program import Role
from tfqc.models.find import from_diffusers
from tfqc.models.spec import ModelSpec

UNQUANTIZED = "fake-quant{weights=none activations=none}"
DTYPES = [torch.float32, torch.bfloat16]
X, T = torch.linspace(-1, 1, 16).reshape(2, 8), torch.tensor([750, 750])


class Plain(nn.Module):
    """A layer that the time shifts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.time = nn.Linear(8, 8), nn.Linear(1, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.inner(x) + self.time((t[:, None] / 1000).to(x.dtype))
        return y if shift is None else y + shift


class ByKeyword(Plain):
    def forward(self, x: Tensor, *, t: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, shift)


class OtherNames(Plain):
    def forward(self, when: Tensor, what: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(what, when)


class CompVis(nn.Module):
    """A denoiser as in the repositories of OpenAI and CompVis: `forward(x, timesteps, context=None, y=None)`."""

    def __init__(self, context: int = 6, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.label_emb, self.num_classes = nn.Embedding(classes, 16), classes
        self.input_blocks = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)])
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(16, 16))
        self.out_norm, self.to_q = nn.GroupNorm(4, 8), nn.Linear(8, 8, bias=False)
        self.to_k, self.to_v = nn.Linear(context, 8, bias=False), nn.Linear(context, 8, bias=False)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Conv2d(16, 4, 3, padding=1)
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.out.weight.dtype

    def forward(
        self, x: Tensor, timesteps: Any = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        args = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(4, dtype=torch.float32) / 4)[None]
        emb = self.time_embed(torch.cat([torch.cos(args), torch.sin(args)], dim=-1).type(self.dtype))
        if y is not None:
            assert y.shape == (x.shape[0],)
            emb = emb + self.label_emb(y)
        hs = []
        h = x.type(self.dtype)
        for module in self.input_blocks:
            h = module(h)
            hs.append(h)
        scale, shift = torch.chunk(self.emb_layers(emb)[:, :, None, None], 2, dim=1)
        h = F.silu(self.out_norm(h) * (1 + scale) + shift)
        b, c, height, width = h.shape
        q = self.to_q(h.reshape(b, c, height * width).permute(0, 2, 1))
        weights = torch.einsum("bid,bjd->bij", q, self.to_k(context)).softmax(dim=-1)
        h = h + torch.einsum("bij,bjd->bid", weights, self.to_v(context)).permute(0, 2, 1).reshape(h.shape)
        hs.pop()
        return self.out(torch.cat([self.up(h), hs.pop()], dim=1)).type(x.dtype)


class Preconditioned(nn.Module):
    """A denoiser as in EDM: sigma is a vector, what the network is given of it is computed inside."""

    def __init__(self, label_dim: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.label_dim, self.sigma_data, self.use_fp16 = label_dim, 0.5, False
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.map, self.label = nn.Linear(8, 8), nn.Linear(label_dim, 8, bias=False)
        self.requires_grad_(False)

    def model(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        angles = noise.ger(torch.arange(4) + 1.0).to(self.map.weight.dtype)
        emb = self.map(torch.cat([angles.cos(), angles.sin()], dim=1))
        if labels is not None:
            emb = emb + self.label(labels.to(emb.dtype))
        return self.out(F.silu(self.conv(x.to(emb.dtype)) + emb[:, :, None, None]))

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False, **kwargs: Any
    ) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        labels = torch.zeros([1, self.label_dim], device=x.device) if class_labels is None else class_labels
        dtype = torch.float16 if (self.use_fp16 and not force_fp32 and x.device.type == "cuda") else torch.float32
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in, c_noise = 1 / (self.sigma_data**2 + sigma**2).sqrt(), sigma.log() / 4
        F_x = self.model((c_in * x).to(dtype), c_noise.flatten(), labels.to(torch.float32), **kwargs)
        return c_skip * x + c_out * F_x.to(torch.float32)


def loaded(model: Any, example: Any, out: Path, target: str = UNQUANTIZED, **options: Any) -> nn.Module:
    options = {"schedule": diffusers.DDIMScheduler(), "steps": 4, "calibration": 2, **options}
    tfqc.compile(model, target, example_inputs=example, **options).save(out)
    return tfqc.load(out)


@pytest.mark.parametrize("given", [(X, T), [X, T], {"x": X, "t": T}], ids=["tuple", "list", "mapping"])
@pytest.mark.parametrize(
    "wrap", [lambda m: m, torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))],
    ids=["plain", "compiled", "parallel", "both"],
)  # fmt: skip
def test_wrapped_models_and_every_kind_of_example(wrap: Callable[[Any], Any], given: Any, tmp_path: Path) -> None:
    model = Plain()
    assert unwrapped(wrap(model)) is model
    torch.testing.assert_close(loaded(wrap(model), given, tmp_path / "out")(X, T), model(X, T))
    assert "inner.weight" in capture(wrap(model), given).tensors


def test_models_that_torch_compiles_when_called(tmp_path: Path) -> None:
    model = Plain()
    model.compile()
    torch.testing.assert_close(loaded(model, (X, T), tmp_path / "out")(X, T), Plain()(X, T))


def test_a_compiled_model_of_diffusers_has_its_examples() -> None:
    model = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                                  down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    spec = from_diffusers(torch.compile(model))
    assert spec.model is model and spec.name == "UNet2DModel" and spec.sample_shape() == (3, 8, 8)


@pytest.mark.parametrize("shift", [None, X])
def test_arguments_by_keyword_alone(shift: Tensor | None, tmp_path: Path) -> None:
    model = ByKeyword()
    call: dict[str, Any] = {"x": X, "t": T} if shift is None else {"x": X, "t": T, "shift": shift}
    got = loaded(model, call, tmp_path / "out")
    torch.testing.assert_close(got(**call), model(**call))
    torch.testing.assert_close(got(X, t=T, shift=shift), model(X, t=T, shift=shift))


@pytest.mark.parametrize(
    "roles",
    [
        {"when": "time", "what": "sample"}, {0: "time", 1: "sample"}, {0: "time", "what": "sample"}, ["time", "sample"],
        ("time", "sample"), lambda name, value: "time" if value.dim() == 1 else "sample",
        lambda name, value: {"when": "time", "what": "sample"}[name],
    ],
)  # fmt: skip
def test_roles_by_name_position_or_function(roles: Any, tmp_path: Path) -> None:
    model = OtherNames()
    torch.testing.assert_close(loaded(model, (T, X), tmp_path / "out", roles=roles)(T, X), model(T, X))
    program = capture(model, (T, X), roles=roles)
    assert [i.role for i in program.inputs] == [Role.TIME, Role.SAMPLE]


@pytest.mark.parametrize("roles", [{5: "time"}, {-1: "time"}, [None, None, "time"]])
def test_positions_that_there_are_not(roles: Any) -> None:
    with pytest.raises(CaptureError, match=r"There is no input number -?\d to give a role; the inputs are when, what"):
        capture(OtherNames(), (T, X), roles=roles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [UNQUANTIZED, "fake-quant", "cpu-int8"])
@pytest.mark.parametrize("labels", [None, torch.tensor([1, 4])], ids=["no labels", "labels"])
def test_denoisers_of_compvis(labels: Tensor | None, target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = CompVis().to(dtype)
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g).to(dtype), torch.randn(2, 3, 6, generator=g).to(dtype)
    call: dict[str, Any] = {"x": x, "timesteps": T, "context": context, **({} if labels is None else {"y": labels})}
    got, want = loaded(model, call, tmp_path / "out", target)(**call), model(**call)
    assert got.dtype == want.dtype == dtype
    error = float((got.float() - want.float()).norm() / want.float().norm())
    assert error < {UNQUANTIZED: 0.02 if dtype is torch.bfloat16 else 1e-5}.get(target, 0.1)


@pytest.mark.parametrize("labels", [None, torch.eye(3)[:2]], ids=["no labels", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denoisers_that_precondition_inside(labels: Tensor | None, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every coefficient waits for sigma: they fold, and any sigma is right, in the schedule or not."""
    model = Preconditioned()
    model.conv, model.out, model.map, model.label = (
        m.to(dtype) for m in (model.conv, model.out, model.map, model.label)
    )
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"x": x, "sigma": torch.tensor([2.5, 2.5])}
    call |= {} if labels is None else {"class_labels": labels}
    got = loaded(model, call, tmp_path / "out", schedule=[80.0, 2.5, 0.3, 0.002], steps=None)
    for sigma in (torch.tensor([2.5, 2.5]), torch.tensor([80.0, 0.002]), torch.tensor([7.0, 0.1]), torch.tensor(0.3)):
        want = model(**{**call, "sigma": sigma.expand(2)})
        tolerance = 1e-5 if dtype is torch.float32 else 0.02
        torch.testing.assert_close(got(**{**call, "sigma": sigma}), want, rtol=tolerance, atol=tolerance)


# -- calibration -------------------------------------------------------------------------------------------------------


def spec() -> ModelSpec:
    return ModelSpec("a model", Plain(), {"x": X, "t": T, "shift": X}, diffusers.DDIMScheduler())


def test_noise_alone() -> None:
    noise = torch.randn(5, 8)
    data = spec().calibration_of(noise)
    assert torch.equal(data.latents, noise) and data.cond["shift"].shape == (5, 8)


def test_inputs_by_name() -> None:
    shift, noise = torch.randn(3, 8), torch.randn(3, 8)
    data = spec().calibration_of({"shift": shift})
    assert data.latents.shape == (3, 8) and torch.equal(data.cond["shift"], shift)
    both = spec().calibration_of({"x": noise, "shift": shift})
    assert torch.equal(both.latents, noise) and torch.equal(both.cond["shift"], shift)


@pytest.mark.parametrize("given", [torch.randn(3, 8), {"shift": torch.randn(3, 8)}])
def test_compiled_with_them(given: Any, tmp_path: Path) -> None:
    got = loaded(Plain(), {"x": X, "t": T, "shift": X}, tmp_path / "out", "cpu-int8", calibration=given)(X, T, X)
    assert float((got - Plain()(X, T, X)).norm() / Plain()(X, T, X).norm()) < 0.1
    assert '"images": 3' in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"y": X}, "'y' is no input of the model; it takes x, t, shift"),
        ({"t": T}, "'t' is the time, which the schedule tells"),
        ({"shift": X[:, :3]}, r"shift is \[2, 3\], and the example is \[2, 8\]"),
        ({"shift": "x"}, r"shift is a str, and the example is \[2, 8\]"),
        (torch.randn(3), r"x is \[3\], and the example is \[2, 8\]"),
    ],
)
def test_calibration_that_does_not_fit(given: Any, why: str) -> None:
    with pytest.raises(CalibrationError, match=why):
        spec().calibration_of(given)


def test_a_program_has_nothing_to_complete_them_with() -> None:
    program = capture(Plain(), (X, T))
    with pytest.raises(CalibrationError, match="captured Program has no example inputs"):
        tfqc.compile(program, schedule=diffusers.DDIMScheduler(), steps=4, calibration=X)
    with pytest.raises(CalibrationError, match="captured Program has no example inputs to draw 8 images for"):
        tfqc.compile(program, schedule=diffusers.DDIMScheduler(), steps=4, calibration=8)


def test_a_cache_that_skips_blocks_is_refused() -> None:
    """As `enable_cache` hangs it on a model of diffusers: what it computed at one step would be that of all."""
    model: Any = Plain()
    model.inner._diffusers_hook = SimpleNamespace(hooks={"mag_cache": SimpleNamespace(_is_stateful=True)})
    with pytest.raises(CaptureError, match=r"inner has the hook 'mag_cache'.*disable_cache"):
        capture(model, {"x": X, "t": T})
    model.inner._diffusers_hook.hooks = {"group_offloading": SimpleNamespace(_is_stateful=False)}
    capture(model, {"x": X, "t": T})


def test_one_text_for_all_images_or_one_for_each_as_in_the_example() -> None:
    for_all = capture(Plain(), {"x": X, "t": T, "shift": torch.ones(1, 8)})
    torch.testing.assert_close(for_all(x=X, t=T, shift=torch.ones(1, 8)), Plain()(X, T, torch.ones(1, 8)))
    with pytest.raises(ValueError, match=r"shift is 2x8; this model takes 1x8, one for all images as in the example"):
        for_all(x=X, t=T, shift=torch.ones(2, 8))
    each = capture(Plain(), {"x": X, "t": T, "shift": torch.ones(2, 8)})
    with pytest.raises(ValueError, match=r"one for each of x: give shift\.expand\(2, -1\), where one is for all"):
        each(x=X, t=T, shift=torch.ones(1, 8))


class Flipping(Plain):
    def forward(self, x: Tensor, t: Tensor, flip: bool = False, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(x.flip(1) if flip else x, t) * scale


@pytest.mark.parametrize(("flip", "said"), [(False, 0), (True, 1)])
def test_a_value_that_is_not_the_default_is_told(flip: bool, said: int) -> None:
    call = {"x": X, "t": T, "flip": flip, "scale": 1.0}
    artifact = tfqc.compile(Flipping(), UNQUANTIZED, schedule=[750], calibration=[call], example_inputs=call)
    lines = [line for line in artifact.facts["report"] if "leaves it out" in line]
    assert lines == ["flip is True, as in the example inputs: a call that leaves it out gets that, too"] * said


class Talking(Plain):
    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        print("of the model's own", file=sys.stderr)
        return super().forward(x, t, shift) if x.sum() > 0 else x


def test_what_fails_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Without the graphs and log lines of torch.export; what the model prints is printed."""
    with pytest.raises(CaptureError, match=r"Talking decides at .*test_door"):
        capture(Talking(), (X, T))
    assert set(capfd.readouterr().err.split("\n")) == {"of the model's own", ""}
