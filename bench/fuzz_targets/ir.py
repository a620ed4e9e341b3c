"""IR text of all stages and backends: parsed, verified, typed once more, and rendered back."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tfqc
from tfqc.instruments import Instrument
from tfqc.ir import parse, render, verify
from tfqc.ir.infer import infer_type
from tfqc.ir.program import Program
from tfqc.passing import Pass


class _Tiny(nn.Module):
    """A convolution whose channels a time MLP shifts, with what text has of every kind: lists, slices, flags."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 4, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.norm = nn.GroupNorm(2, 4)
        self.conv_out = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.time(timestep[:, None].to(torch.float32) / 1000).chunk(2, dim=1)
        hidden = self.norm(self.conv_in(sample)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        hidden += text.mean(1)[:, :4, None, None]
        return self.conv_out(F.silu(hidden))


INPUTS = {
    "sample": torch.linspace(-1, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4),
    "timestep": torch.tensor([7, 421]),
    "text": torch.ones(2, 3, 4),
}


class _Collect(Instrument):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        self.texts.append(render(program))


@functools.cache
def _seeds() -> list[bytes]:
    torch.manual_seed(0)
    model = _Tiny().requires_grad_(False)
    captured = tfqc.capture(model, INPUTS, roles={"text": "request"})
    texts = [render(captured)]
    for target in ("fake-quant{weights=4 activations=8}", "cpu-int8", "cuda-int4{arch=sm_86 mode=w4a4}"):
        collect = _Collect()
        calibration = tfqc.Calibration(torch.randn(2, 2, 4, 4), {"text": torch.ones(2, 3, 4)}, batch_size=2)
        tfqc.compile(
            captured, target, schedule=DDIMScheduler(1000), steps=3, strategy="fold", calibration=calibration,
            instruments=[collect],
        )  # fmt: skip
        texts += collect.texts
    return [text.encode() for text in dict.fromkeys(texts)]


def text(data: bytes, work: Path) -> None:
    """Parse, verify, infer the type of one operation, and render what was read."""
    program = parse(data.decode("utf-8", "replace"))
    again = render(program)
    if render(parse(again)) != again:
        raise AssertionError("what was rendered is read as another program")
    verify(program)
    for node in program.step.nodes:
        if node.op == "call_function":
            infer_type(program, node)
            break


TARGETS = {"ir": text}
SEEDS = {"ir": _seeds()}
